"""Fine-tuning that was stopped: it goes on to the bits of an unbroken one, or says why not."""

import contextlib
import dataclasses
import json
import os
import signal

import pytest
import torch
from builders import QUICK_FINETUNING as QUICK

from mmmodel import checkpoint, plot, update
from mmmodel.data.shards import write_index, write_shard
from mmmodel.export import open_run
from mmmodel.finetuning import loop
from mmmodel.finetuning import run as finetuning


def epochs(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_weights(one, two):
    ours, theirs = open_run(one).tensors, open_run(two).tensors
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.fixture
def stopping(monkeypatch):
    """The epoch, from 0, before which a fine-tuning is stopped; each one has a checkpoint."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    order, before = loop._order, {"epoch": None}

    def stop(count, config, epoch):
        if epoch == before["epoch"]:
            raise KeyboardInterrupt
        return order(count, config, epoch)

    monkeypatch.setattr(loop, "_order", stop)
    return before


@pytest.mark.parametrize("fields", [{}, {"freeze": "encoder"}], ids=["all", "head"])
def test_a_stopped_fine_tuning_goes_on_to_the_same_bits(run, labelled, tmp_path, stopping, fields):
    """Stopped in its fourth epoch, with dropout; one of another rate in the same folder begins anew."""
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), epochs=5, dropout=0.3, **fields)
    report = finetuning.finetune(run, config, tmp_path / "unbroken")
    stopping["epoch"] = 3
    for lr in (0.5, config.lr):
        with pytest.raises(KeyboardInterrupt):
            finetuning.finetune(run, dataclasses.replace(config, lr=lr), tmp_path / "stopped")
        assert checkpoint.saved(tmp_path / "stopped" / ".checkpoints")[0].name == "step-00000006"
    stopping["epoch"] = None
    again = finetuning.finetune(run, config, tmp_path / "stopped")
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    assert epochs(tmp_path / "stopped") == epochs(tmp_path / "unbroken")  # the weights are those of the best alone
    assert_same_weights(tmp_path / "stopped", tmp_path / "unbroken")
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        path.name for path in (tmp_path / "unbroken").iterdir()
    }


@pytest.mark.parametrize(
    ("fields", "number", "by", "raised"),
    [
        ({}, 5, signal.SIGTERM, SystemExit),  # an epoch has two steps
        ({"augment": True}, 4, signal.SIGINT, KeyboardInterrupt),  # at the end of an epoch
        ({"freeze": "encoder"}, 1, signal.SIGTERM, SystemExit),
        ({"task": "retrieval", "label": "concept"}, 3, signal.SIGINT, KeyboardInterrupt),
    ],
    ids=["inside an epoch", "after an epoch", "head", "retrieval"],
)
def test_sigterm_and_ctrl_c_save_the_step_and_the_same_command_goes_on_to_the_same_bits(
    run, labelled, shards, tmp_path, monkeypatch, caplog, fields, number, by, raised
):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), dropout=0.3, epochs=4)
    config = dataclasses.replace(config, **fields)
    if config.task == "retrieval":
        config = dataclasses.replace(config, data=str(shards))
    finetuning.finetune(run, config, tmp_path / "unbroken")
    total = epochs(tmp_path / "unbroken")[-1]["step"]
    steps, schedule = [], loop._schedule

    def signalled(step, *args):
        steps.append(step)
        if len(steps) == number:
            os.kill(os.getpid(), by)
        return schedule(step, *args)

    monkeypatch.setattr(loop, "_schedule", signalled)
    with caplog.at_level("INFO"), pytest.raises(raised) as ended:
        finetuning.finetune(run, config, tmp_path / "stopped")
    said = f"stopped after step {number} of {total}; the same command goes on from there"
    if by == signal.SIGTERM:
        assert (caplog.messages[-1], ended.value.code) == (said, 143)
    else:
        assert str(ended.value) == said
    finetuning.finetune(run, config, tmp_path / "stopped")
    assert steps == list(range(total))
    assert_same_weights(tmp_path / "stopped", tmp_path / "unbroken")
    assert epochs(tmp_path / "stopped") == epochs(tmp_path / "unbroken")


@pytest.fixture
def gpu(monkeypatch):
    """A generator that stands for a GPU's, as there is none here: dropout draws from it."""
    generator = torch.Generator()
    monkeypatch.setattr(update, "gpus", lambda device: [torch.device("cuda")])
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generator.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generator.set_state(state))
    monkeypatch.setattr(torch.cuda, "manual_seed", generator.manual_seed)

    def dropped(self, x):
        return x * (torch.rand(x.shape, generator=generator) > self.p) / (1 - self.p) if self.training else x

    monkeypatch.setattr(torch.nn.Dropout, "forward", dropped)
    return generator


def test_dropout_that_a_gpu_draws_goes_on_where_it_stopped(run, labelled, tmp_path, stopping, gpu, monkeypatch):
    """And the training leaves the GPU's generator as it was."""

    def train(*args):
        before = gpu.get_state()
        outcome = loop.train(*args)
        assert torch.equal(gpu.get_state(), before)
        return outcome

    monkeypatch.setattr(finetuning, "train", train)
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), epochs=4, dropout=0.5, freeze="encoder")
    finetuning.finetune(run, config, tmp_path / "unbroken")
    stopping["epoch"] = 2
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(run, config, tmp_path / "stopped")
    stopping["epoch"] = None
    finetuning.finetune(run, config, tmp_path / "stopped")
    assert epochs(tmp_path / "stopped") == epochs(tmp_path / "unbroken")
    assert_same_weights(tmp_path / "stopped", tmp_path / "unbroken")


def test_what_was_stopped_on_a_cpu_or_by_an_earlier_version_goes_on_on_a_gpu(
    run, labelled, tmp_path, stopping, gpu, monkeypatch, caplog
):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), epochs=3, dropout=0.5, freeze="encoder")
    stopping["epoch"] = 2
    with monkeypatch.context() as patch:
        patch.setattr(update, "gpus", lambda device: [])
        with pytest.raises(KeyboardInterrupt):
            finetuning.finetune(run, config, tmp_path)
    stopping["epoch"] = None
    with caplog.at_level("INFO"):
        assert finetuning.finetune(run, config, tmp_path)["epochs"] == 3
    assert "continuing at step 4 of 6" in caplog.text


def test_a_stopped_fine_tuning_has_the_curve_of_its_epochs(run, labelled, tmp_path, stopping, monkeypatch):
    """Of the third epoch, which has no checkpoint, the line goes when it is done again; and no one's lines stay."""
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=5)

    def stopped(epoch, **fields):
        stopping["epoch"] = epoch
        with pytest.raises(KeyboardInterrupt):
            finetuning.finetune(run, dataclasses.replace(config, **fields), tmp_path)
        return [line["epoch"] for line in epochs(tmp_path)]

    assert stopped(2) == [1, 2]
    assert plot.plot_run(tmp_path) == tmp_path / "curves.png"
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 60)
    assert stopped(3) == [1, 2, 3]
    assert stopped(2) == [1, 2]
    assert stopped(0, lr=0.5) == []
    stopping["epoch"] = None
    report = finetuning.finetune(run, config, tmp_path)  # the folder was free, and the rate above left nothing in it
    assert report["epochs"] == len(epochs(tmp_path)) == 5


def test_a_stopped_fine_tuning_begins_anew_where_the_labels_were_corrected(run, tmp_path, stopping):
    """In the same files, and as many of each class: "red" where it said "blue", and the other way round."""

    def write(names):
        splits = ["train"] * 12 + ["validation"] * 4
        meta = [{"split": split, "colour": names[i % 2]} for i, split in enumerate(splits)]
        made = [{"__key__": f"k{i}", "txt": f"{i % 2}", "json": fields} for i, fields in enumerate(meta)]
        write_index(tmp_path, write_shard(tmp_path / "a-0.tar", made))

    config = dataclasses.replace(QUICK, label="colour", data=str(tmp_path), epochs=3)
    write(("red", "blue"))
    stopping["epoch"] = 2
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(run, config, tmp_path / "stopped")
    stopping["epoch"] = None
    write(("blue", "red"))
    for out in ("stopped", "fresh"):
        finetuning.finetune(run, config, tmp_path / out)
    assert epochs(tmp_path / "stopped") == epochs(tmp_path / "fresh")


def test_what_stopped_fine_tunings_left_is_continued_elsewhere_or_goes_with_a_word(
    run, labelled, tmp_path, stopping, caplog
):
    """Other settings are named; a damaged note of them is nobody's; another number of threads matters not."""
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=4)

    def stopped(epoch, **fields):
        caplog.clear()
        stopping["epoch"] = epoch
        with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt):
            finetuning.finetune(run, dataclasses.replace(config, **fields), tmp_path)
        return caplog.text

    assert "anew" not in stopped(1)
    assert "begins anew, for what was stopped there had other config.lr 0.01 -> 0.5" in stopped(1, lr=0.5)
    (tmp_path / ".checkpoints" / "about.json").write_text("{")
    assert "begins anew, for about.json does not read: Expecting" in stopped(1, threads=config.threads + 1)
    assert "continuing at step 2 of 8" in stopped(2)


def test_a_fine_tuning_that_was_stopped_before_its_report_still_has_its_checkpoints(
    run, labelled, tmp_path, stopping, monkeypatch
):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=2)
    original = finetuning.atomic.write_json

    def stop(path, content):
        if path.name == "report.json":
            raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(finetuning.atomic, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(run, config, tmp_path)
    monkeypatch.setattr(finetuning.atomic, "write_json", original)
    stopping["epoch"] = 0  # none is computed again
    assert finetuning.finetune(run, config, tmp_path)["epochs"] == 2
    assert not (tmp_path / ".checkpoints").exists()

"""From a run and labelled shards to a fine-tuned model: every task learns, and what is saved is what was scored."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from builders import batch_of, learner, samples
from matplotlib import pyplot

from mmmodel import checkpoint, cli, plot
from mmmodel.configs import ConfigError
from mmmodel.data.shards import write_index, write_shard
from mmmodel.export import CheckpointError, from_pretrained, open_run
from mmmodel.finetuning import loop
from mmmodel.finetuning import run as finetuning
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.labels import Labels
from mmmodel.finetuning.learner import FineTuned, make_loss, parameter_groups
from mmmodel.finetuning.loop import evaluate_on
from mmmodel.model import Model

QUICK = FinetuneConfig(epochs=12, patience=0, lr=1e-2, layer_decay=1.0, augment=False, dropout=0.0, warmup_share=0.05)


@pytest.mark.parametrize(
    ("task", "label", "bar"),
    [
        ("classification", "colour", 0.95),  # a third by chance
        ("multilabel", "names", 0.7),
        ("regression", "size", 0.3),  # 0 for the mean
        ("qa", "colour", 0.95),
    ],
)
def test_each_task_learns_and_what_is_saved_is_what_was_scored(run, labelled, tmp_path, task, label, bar):
    config = dataclasses.replace(QUICK, task=task, label=label, data=str(labelled))
    if task == "qa":
        config = dataclasses.replace(config, question="about")
    report = finetuning.finetune(run, config, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["counts"] == {"train": 64, "validation": 16, "test": 16, "without_label": 0}
    assert report["validation"][report["score"]] >= bar
    assert report["loaded"]["missing"] == report["loaded"]["misshapen"] == []
    assert len(report["loaded"]["matched"]) == len(open_run(run).tensors) - sum(
        name.startswith("objectives.") for name in open_run(run).tensors
    )
    again, labels, read_config = finetuning.load(tmp_path)
    assert read_config == config
    assert list(labels.classes) == report["classes"]
    data, _ = finetuning.read_labelled(open_run(run).config, again.model, config)
    with torch.no_grad():
        assert evaluate_on(again, data, data.test) == pytest.approx(report["test"])
        assert evaluate_on(again, data, data.validation) == pytest.approx(report["validation"])


def test_retrieval_starts_from_the_runs_own_head_and_saves_it_where_a_run_has_it(run, shards, tmp_path):
    config = dataclasses.replace(QUICK, task="retrieval", label="concept", data=str(shards), epochs=2, lr=1e-3)
    report = finetuning.finetune(run, config, tmp_path)
    assert report["validation"].keys() == {"r1", "r5", "r10"}
    assert "objectives.contrastive.heads" in report["loaded"]["matched"]
    assert "objectives.contrastive.heads" in open_run(tmp_path).tensors
    again, _, _ = finetuning.load(tmp_path)
    data, _ = finetuning.read_labelled(open_run(run).config, again.model, config)
    assert evaluate_on(again, data, data.test) == pytest.approx(report["test"])


def test_a_test_split_that_retrieval_cannot_score_costs_no_training(run, shards, tmp_path, caplog):
    """Its samples are captions alone."""
    data = shutil.copytree(shards, tmp_path / "data")
    for path in data.glob("*test*.tar"):
        path.unlink()
    made = [{"__key__": f"t{i}", "txt": "a", "json": {"split": "test", "concept": i}} for i in "ab"]
    write_shard(data / "t.tar", made)
    config = dataclasses.replace(QUICK, task="retrieval", label="concept", data=str(data), epochs=1)
    assert finetuning.finetune(run, config, tmp_path / "out")["test"] is None
    assert "not scored: finetune: no label has samples of two modalities" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_test_split_that_another_task_cannot_score_is_an_error(run, labelled, tmp_path, monkeypatch):
    def refuses(*_):
        raise ConfigError("finetune: something is wrong")

    monkeypatch.setattr(finetuning, "evaluate_on", refuses)
    config = dataclasses.replace(QUICK, task="classification", label="colour", data=str(labelled), epochs=1)
    with pytest.raises(ConfigError, match="something is wrong"):
        finetuning.finetune(run, config, tmp_path)


def test_a_label_that_no_training_sample_has_is_told(run, tmp_path, caplog):
    said = [("train", "a"), ("train", "b")] * 4 + [("validation", "a"), ("validation", "c"), ("test", "b")]
    made = [{"__key__": f"k{i}", "txt": x, "json": {"split": split, "label": x}} for i, (split, x) in enumerate(said)]
    write_shard(tmp_path / "data.tar", made)
    config = dataclasses.replace(QUICK, label="label", data=str(tmp_path), epochs=1)
    finetuning.finetune(run, config, tmp_path / "out")
    expected = "validation: 1 of 2 samples have a label that no training sample has, such as 'c': it is never predicted"
    assert [record.message for record in caplog.records if "no training sample" in record.message] == [expected]


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_bf16_trains_under_autocast_and_scores_in_fp32(run, labelled, shards, tmp_path, task, monkeypatch):
    label, data = ("concept", shards) if task == "retrieval" else ("colour", labelled)
    seen = set()
    original = Model.forward

    def forward(model, *args):
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return original(model, *args)

    monkeypatch.setattr(Model, "forward", forward)
    config = dataclasses.replace(QUICK, task=task, label=label, data=str(data), epochs=6)
    exact = finetuning.finetune(run, config, tmp_path / "fp32")
    assert seen == {(True, False), (False, False)}
    seen.clear()
    report = finetuning.finetune(run, dataclasses.replace(config, precision="bf16"), tmp_path / "bf16")
    assert seen == {(True, True), (False, False)}
    assert {tensor.dtype for tensor in open_run(tmp_path / "bf16").tensors.values()} == {torch.float32}
    assert report["validation"][report["score"]] == pytest.approx(exact["validation"][report["score"]], abs=0.15)
    assert json.loads((tmp_path / "bf16" / "finetune.json").read_text())["precision"] == "bf16"


def test_a_folder_that_was_written_before_a_field_was_there_holds_its_default(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=1)
    finetuning.finetune(run, config, tmp_path)
    path = tmp_path / "finetune.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "precision"}))
    finetuning.finetune(run, config, tmp_path)
    with pytest.raises(ConfigError, match="other precision fp32 -> bf16"):
        finetuning.finetune(run, dataclasses.replace(config, precision="bf16"), tmp_path)


def test_a_frozen_encoder_stays_as_it_was_and_the_head_learns(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=3)
    finetuning.finetune(run, config, tmp_path)
    before, after = open_run(run).tensors, open_run(tmp_path).tensors
    for name, tensor in before.items():
        if name.startswith("model."):
            assert torch.equal(after[name], tensor), name
    assert after["head.weight"].abs().sum() > 0


def test_what_needs_the_heads_of_pretraining_says_that_they_are_gone(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=1)
    finetuning.finetune(run, config, tmp_path)
    with pytest.raises(CheckpointError, match="is fine-tuned, the heads of its pretraining are gone; predict, embed,"):
        from_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is fine-tuned, the heads of its pretraining are gone"):
        cli.main(["evaluate", "--from", str(tmp_path)])


def test_a_model_is_read_whatever_limits_its_training_would_have_today(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), freeze="encoder", epochs=1)
    finetuning.finetune(run, config, tmp_path)
    about = json.loads(open_run(tmp_path).finetuning)
    for fields, readable in (({"lr": 5.0, "epochs": 0}, True), ({"visibility": "none"}, False)):
        changed = json.dumps({**about, "config": {**about["config"], **fields}})
        source = dataclasses.replace(open_run(tmp_path), finetuning=changed)
        if readable:
            assert finetuning.restore(source)[2].lr == 5.0
        else:
            with pytest.raises(CheckpointError, match="fine-tuning does not read: finetune: visibility is 'none'"):
                finetuning.restore(source)


def test_the_best_epoch_is_kept_and_patience_stops(run, labelled, tmp_path):
    """A rate this high spoils what the first epochs learnt: the weights kept are those of the best."""
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), lr=0.3, epochs=40, patience=3)
    report = finetuning.finetune(run, config, tmp_path)
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [line["balanced_accuracy"] for line in history]
    assert report["best_epoch"] == int(np.argmax(scores)) + 1
    assert report["validation"]["balanced_accuracy"] == pytest.approx(max(scores), rel=1e-5)
    assert report["epochs"] == len(history) == min(40, report["best_epoch"] + 3)


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

    def stopping(step, *args):
        steps.append(step)
        if len(steps) == number:
            os.kill(os.getpid(), by)
        return schedule(step, *args)

    monkeypatch.setattr(loop, "_schedule", stopping)
    with caplog.at_level("INFO"), pytest.raises(raised) as ended:
        finetuning.finetune(run, config, tmp_path / "stopped")
    said = f"stopped after step {number} of {total}; the same command goes on from there"
    assert (caplog.messages[-1], ended.value.code) == (said, 143) if by == signal.SIGTERM else ended.match(said)
    finetuning.finetune(run, config, tmp_path / "stopped")
    assert steps == list(range(total))
    assert_same_weights(tmp_path / "stopped", tmp_path / "unbroken")
    assert epochs(tmp_path / "stopped") == epochs(tmp_path / "unbroken")


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


def test_torchrun_is_refused_before_anything_is_read(run, labelled, tmp_path, monkeypatch):
    """Each of its processes would train the same model in the same folder."""
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(ConfigError, match="finetune: is one process, expected to be started without torchrun"):
        finetuning.finetune(run, dataclasses.replace(QUICK, data=str(labelled)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_scratch_loads_nothing(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), from_scratch=True, epochs=1, seed=7)
    report = finetuning.finetune(run, config, tmp_path)
    assert report["loaded"] is None


def test_data_without_a_validation_split_gets_one(run, labelled, tmp_path):
    made = [
        {"__key__": f"k{i}", "txt": "red" if i % 2 else "blue", "json": {"colour": "red" if i % 2 else "blue"}}
        for i in range(100)
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-0.tar", made))
    config = dataclasses.replace(QUICK, label="colour", data=str(tmp_path))
    data, counts = finetuning.read_labelled(open_run(run).config, learner()[1].model, config)
    assert 3 <= counts["validation"] <= 20
    assert counts["train"] == 100 - counts["validation"]
    assert not {item.group for item in data.train} & {item.group for item in data.validation}


def test_layers_further_from_the_head_learn_slower():
    """Two blocks: front ends at 0.5 ** 3 of the rate, block 0 at 0.25, block 1 and the last norm at 0.5, head at 1."""
    _, made = learner()
    tuned = FineTuned(made.model, 3, visibility="full", dropout=0.0)
    rate = {}
    for group in parameter_groups(tuned, lr=1.0, layer_decay=0.5, weight_decay=0.1):
        for parameter in group["params"]:
            rate[id(parameter)] = group["lr"], group["weight_decay"]
    found = {name: rate[id(parameter)] for name, parameter in tuned.named_parameters()}
    assert len(rate) == len(found)
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)
    assert found["model.norm.weight"] == (0.5, 0.0)
    assert found["model.blocks.1.qkv.weight"] == (0.5, 0.1)
    assert found["model.blocks.0.qkv.bias"] == (0.25, 0.0)
    assert found["model.embedding.token_weight"] == (0.125, 0.0)
    assert found["model.front_ends.audio.convs.0.weight"] == (0.125, 0.1)


def test_a_samples_output_does_not_depend_on_its_batch():
    _, made = learner()
    tuned = FineTuned(made.model, 3, visibility="full", dropout=0.0).eval()
    torch.nn.init.normal_(tuned.head.weight)
    items, features = samples()
    with torch.no_grad():
        together = tuned(batch_of(made, items, features))
        alone = torch.cat([tuned(batch_of(made, [item], features)) for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_balanced_loss_by_hand():
    """Three of one class, one of the other, all equally likely: each class brings half, log 2 in all."""
    labels = Labels("classification", classes=("a", "b"))
    loss = make_loss(labels, ["a", "a", "a", "b"], balance=True)
    outputs = torch.tensor([[0.0, 0.0]] * 3 + [[0.0, 2.0]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(1 + np.exp(-2))
    assert float(loss(outputs, torch.tensor([0, 0, 0, 1]))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "colours"}, "no sample has a label 'colours'; their fields are about, colour"),
        ({"modalities": ("smell",)}, "the model reads text, image, audio, not smell"),
        ({"task": "qa", "question": "none"}, "no sample has a question 'none'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(run, labelled, tmp_path, fields, message, caplog):
    """For labels and modalities before hours may have gone into decoding."""
    caplog.set_level("INFO")
    config = dataclasses.replace(QUICK, **{"label": "colour", "data": str(labelled), **fields})
    with pytest.raises(ConfigError, match=message):
        finetuning.finetune(run, config, tmp_path)
    assert ("they hold text" in caplog.text) == ("question" in fields)


@pytest.mark.filterwarnings("ignore:R.2 score is not well-defined")
def test_a_validation_set_without_a_score_is_refused(run, tmp_path):
    """R2 of one number is not defined: no epoch could be better than another."""
    made = [
        {"__key__": f"k{i}", "txt": "red", "json": {"size": i, "split": "validation" if i == 0 else "train"}}
        for i in range(9)
    ]
    write_index(tmp_path, write_shard(tmp_path / "a-0.tar", made))
    config = dataclasses.replace(QUICK, task="regression", label="size", data=str(tmp_path))
    with pytest.raises(ConfigError, match="r2 of 1 validation samples is nan"):
        finetuning.finetune(run, config, tmp_path / "out")


def test_its_curves_show_the_validation_scores(tmp_path, recwarn, monkeypatch):
    """R2 may be below zero; of what only a pretraining has there is no panel, and no warning of matplotlib."""
    lines = [{"step": 5 * i, "epoch": i, "loss": 1 / i, "lr": 0.1, "r2": -1 / i, "seconds": 1.0} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot.plot_run(tmp_path)
    validation = figures[0].axes[1]
    assert validation.get_title() == "validation"
    assert [text.get_text() for text in validation.get_legend().get_texts()] == ["r2"]
    assert validation.get_ylim()[0] < -0.9
    assert [axis.get_title() for axis in figures[0].axes[2:4]] == ["", ""]
    assert not recwarn.list


def test_another_fine_tuning_or_a_run_is_not_written_over(run, labelled, tmp_path):
    config = dataclasses.replace(QUICK, label="colour", data=str(labelled), epochs=1)
    finetuning.finetune(run, config, tmp_path)
    with pytest.raises(ConfigError, match=r"holds a fine-tuning with other lr 0.01 -> 0.1; choose"):
        finetuning.finetune(run, dataclasses.replace(config, lr=0.1), tmp_path)
    with pytest.raises(ConfigError, match="is the run to start from"):
        finetuning.finetune(run, config, run)


def test_the_commands(run, labelled, tmp_path, capsys):
    arguments = ["finetune", "--from", str(run), "--data", str(labelled), "--out", str(tmp_path / "out")]
    cli.main([*arguments, "--task", "classification", "--label", "colour", "--freeze", "encoder", "--epochs", "1"])
    assert "test: accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no sample has a label"):
        cli.main([*arguments[:-1], str(tmp_path / "other"), "--label", "none"])
    assert not (tmp_path / "other" / "finetune.json").exists()  # the corrected command may use the folder
    with pytest.raises(SystemExit, match="none: no such file"):
        cli.main(["finetune", "--from", str(tmp_path / "none"), "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="layer_decay is 2"):
        cli.main([*arguments, "--layer-decay", "2"])

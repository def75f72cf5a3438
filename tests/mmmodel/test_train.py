"""The loop: a run that was stopped or killed ends in the very weights of one that was not."""

import dataclasses
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from builders import assert_same_run, batch_of, learner, objective_learner, samples
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from mmmodel import (
    checkpoint,
    cli,
    configs,
    distributed,
    evaluate,
    export,
    held_out,
    metrics,
    objectives,
    plot,
    pretraining,
    train,
)
from mmmodel.batches import Sampler
from mmmodel.configs import ConfigError
from mmmodel.data.shards import write_shard

ROOT = Path(__file__).parents[2]


def test_a_run_leaves_what_the_readme_promises(unbroken):
    expected = {
        "config.json",
        "data.json",
        "tokenizer.json",
        "metrics.jsonl",
        "curves.png",
        "checkpoints",
        "model.safetensors",
    }
    assert {path.name for path in unbroken.iterdir()} == expected | {".lock"}
    lines = metrics.read(unbroken / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    needed = {"loss", "contrastive/loss", "masked_text/loss", "lr", "grad_norm", "tokens_per_s/audio", "fill_percent"}
    assert needed | {"data_wait_ms", "step_ms", "skipped", "mfu_percent", "tflop"} <= lines[-1].keys()
    assert 0 < lines[-1]["mfu_percent"] < 100
    # keep_checkpoints = 2 of those after steps 3, 6 and 8
    assert [path.name for path in checkpoint.saved(unbroken / "checkpoints")] == ["step-00000006", "step-00000008"]
    assert configs.from_dict(json.loads((unbroken / "config.json").read_text())).steps == 8


def stopped_after(number, monkeypatch, by=signal.SIGTERM):
    """A signal in the step of that number; the list grows with each step."""
    steps = []
    original = train.train_step

    def stopping(*args):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), by)
        return original(*args)

    monkeypatch.setattr(train, "train_step", stopping)
    return steps


def test_sigterm_saves_and_the_same_command_continues_to_the_same_bits(tiny, unbroken, tmp_path, monkeypatch):
    """Stopped after step 5, between the checkpoints after 3 and 6."""
    steps = stopped_after(5, monkeypatch)
    assert train.pretrain(tiny, tmp_path) is False
    assert checkpoint.saved(tmp_path / "checkpoints")[-1].name == "step-00000005"
    assert train.pretrain(tiny, tmp_path) is True
    assert len(steps) == 8
    assert_same_run(tmp_path, unbroken)


def test_ctrl_c_saves_and_ends_as_a_shell_expects(tiny, shards, tmp_path, monkeypatch, capsys):
    stopped_after(5, monkeypatch, by=signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        cli.main(["pretrain", "--preset", "tiny", "--set", f"data={shards}", "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("stopped after step 5 of 8; the same command goes on from there\n")
    assert train.pretrain(tiny, tmp_path)


def test_ctrl_c_under_torchrun_is_told_once(shards, tmp_path, monkeypatch, capsys):
    command = ["pretrain", "--preset", "tiny", "--set", f"data={shards}", "--out", str(tmp_path)]
    for rank, said in ((0, "stopped after step 1 of 8; the same command goes on from there\n"), (1, "")):
        stopped_after(1, monkeypatch, by=signal.SIGINT)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert ended.value.code == 130
        assert capsys.readouterr().err.endswith(said) if said else capsys.readouterr().err == ""


def test_a_run_that_is_not_finished_has_the_weights_of_its_last_checkpoint(tiny, tmp_path, monkeypatch, caplog):
    """A report on them is printed, not kept; the run goes on as if nobody had looked."""
    stopped_after(5, monkeypatch)
    assert not train.pretrain(tiny, tmp_path)
    report = evaluate.evaluate(tmp_path)
    assert f"{tmp_path}/model.safetensors: of step 5 of 8, its run is not finished" in caplog.messages
    assert {task["name"] for task in report["tasks"]} > {"speech_to_text", "image_to_text"}
    assert not (tmp_path / "report.json").exists()
    caplog.clear()
    assert train.pretrain(tiny, tmp_path)
    evaluate.evaluate(tmp_path)
    assert "not finished" not in caplog.text
    assert (tmp_path / "report.json").exists()


def test_tensorboard_gets_the_figures_of_the_metrics(tiny, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(tiny, steps=3, tensorboard=True)
    assert train.pretrain(config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert set(events.Tags()["scalars"]) == set(lines[0]) - {"step"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-5)) for line in lines
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train.pretrain(config, tmp_path)


def test_tensorboard_has_the_figures_of_all_steps_before_an_error(tiny, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    closed, updated = [], iter([True, True, False])
    original, close = train.train_step, SummaryWriter.close
    monkeypatch.setattr(train, "train_step", lambda *args: (original(*args)[0], next(updated)))
    monkeypatch.setattr(train, "MAX_SKIPPED_IN_A_ROW", 0)
    # else what its thread has not written is lost with the process
    monkeypatch.setattr(SummaryWriter, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(train.RunError, match="in a row had a gradient that is not finite"):
        train.pretrain(dataclasses.replace(tiny, tensorboard=True), tmp_path)
    assert len(closed) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_figures_on_the_validation_split_leave_the_run_its_bits(tiny, unbroken, tmp_path, caplog):
    caplog.set_level("INFO")
    assert train.pretrain(dataclasses.replace(tiny, evaluate_every=3), tmp_path)
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path, unbroken))
    assert all(torch.equal(one[name], other[name]) for name in other)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    looks = {line["step"]: line for line in lines if any(name.startswith("validation/") for name in line)}
    assert list(looks) == [3, 6, 8]  # the last step too
    learner = export.from_pretrained(tmp_path)
    dataset = pretraining.open_data(tiny)
    corpus = pretraining.load_corpus(tiny, dataset, learner.model)
    found = held_out.figures(learner, corpus, corpus.split("validation"), batches=train.VALIDATION_BATCHES)
    scores = {name: value for name, value in found.items() if held_out.is_score(name)}
    assert {"contrastive/loss", "masked_text/accuracy", "matching/loss"} < scores.keys()
    assert {n.removeprefix("validation/"): v for n, v in looks[8].items() if n.startswith("validation/")} == (
        pytest.approx(scores, rel=1e-4)
    )
    assert [m.partition(":")[0] for m in caplog.messages if "on the split validation" in m] == [
        f"step {step}, on the split validation" for step in looks
    ]


def test_the_curve_of_an_objective_begins_where_it_does():
    mean = plot._running_mean(np.array([np.nan, np.nan, 2.0, np.nan, 4.0]))
    np.testing.assert_array_equal(mean, [np.nan, np.nan, 2, 2, 3])


def test_data_without_a_validation_split_says_that_there_is_nothing_to_see(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    made = [{"__key__": f"k{i}", "txt": f"red {i}", "json": {"split": "train"}} for i in range(8)]
    write_shard(tmp_path / "data" / "a-0.tar", made)
    caplog.set_level("INFO")
    config = dataclasses.replace(configs.tiny(), data=str(tmp_path / "data"), steps=2, evaluate_every=1)
    assert train.pretrain(config, tmp_path / "run")
    assert "evaluate_every does nothing in this run: no sample has the split validation" in caplog.messages
    assert not any(n.startswith("validation/") for n in metrics.read(tmp_path / "run" / "metrics.jsonl")[-1])


def test_fewer_validation_samples_than_processes_are_said_once(tiny, tmp_path, caplog, monkeypatch):
    (tmp_path / "data").mkdir()
    splits = ["train"] * 7 + ["validation"]
    made = [{"__key__": f"k{i}", "txt": f"red {i}", "json": {"split": split}} for i, split in enumerate(splits)]
    write_shard(tmp_path / "data" / "a-0.tar", made)
    config = dataclasses.replace(tiny, data=str(tmp_path / "data"), evaluate_every=1)
    dataset = pretraining.open_data(config)
    learned = pretraining.Pretraining(config, pretraining.make_tokenizer(config, dataset))
    corpus = pretraining.load_corpus(config, dataset, learned.model)
    assert "validation/masked_text/loss" in train.validate(learned, corpus, 1)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    caplog.clear()
    caplog.set_level("INFO")
    train._tell_what_learns_nothing(learned, corpus, Sampler(corpus.split("train"), batch_size=4, seed=0))
    assert train.validate(learned, corpus, 1) == {}
    few = "the split validation has 1 distinct items for 2 processes"
    assert caplog.messages[-1] == f"evaluate_every does nothing in this run: {few}"


def test_kill_9_continues_from_the_last_checkpoint_to_the_same_bits(shards, unbroken, tmp_path):
    """Killed in another process at some moment after its first checkpoint."""
    fields = ["data=" + str(shards), "steps=8"]
    command = [
        sys.executable,
        "-m",
        "mmmodel",
        "pretrain",
        "--preset",
        "tiny",
        "--out",
        str(tmp_path),
        "--set",
        *fields,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "checkpoints" / "step-00000003").exists():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        process.kill()
    before = len(metrics.read(tmp_path / "metrics.jsonl"))
    assert before >= 3
    assert train.pretrain(dataclasses.replace(configs.tiny(), data=str(shards)), tmp_path)
    assert_same_run(tmp_path, unbroken)


def test_a_checkpoint_that_a_kill_cut_goes_at_the_next_start(tiny, tmp_path):
    left = tmp_path / "checkpoints" / ".step-00000001.x1y2.mmmodel-partial" / "step-00000001"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    train.pretrain(dataclasses.replace(tiny, steps=1), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_run_whose_data_lacks_a_modality_continues_too(tmp_path):
    """No gradient reaches the front ends of image and audio, so the optimizer has nothing of them to save."""
    (tmp_path / "data").mkdir()
    made = [{"__key__": f"k{i}", "txt": f"red {i}", "json": {"split": "train"}} for i in range(8)]
    write_shard(tmp_path / "data" / "a-0.tar", made)
    config = dataclasses.replace(configs.tiny(), data=str(tmp_path / "data"), steps=4, checkpoint_every=2)
    for out in ("unbroken", "stopped"):
        assert train.pretrain(config, tmp_path / out)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000004")
    (tmp_path / "stopped" / "model.safetensors").unlink()
    assert train.pretrain(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")


def test_a_parameter_that_its_first_gradient_reaches_after_a_checkpoint_learns_the_same(tmp_path):
    """The optimizer begins its averages then, at step 1, as it would have without a stop."""

    def made():
        torch.manual_seed(0)
        module = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "ab"})
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def step(module, optimizer, names):
        optimizer.zero_grad(set_to_none=True)
        x = torch.arange(8.0).view(2, 4)
        for name in names:
            x = module[name](x)
        x.pow(2).sum().backward()
        optimizer.step()

    one, other = made(), made()
    for _ in range(2):
        step(*one, "a")
    path = checkpoint.save(tmp_path, 2, *one, {"step": 2}, keep=1)
    assert checkpoint.load(path, *other, {"step": 0}) == {"step": 2}
    for names in ("ab", "a", "ab"):
        for learned in (one, other):
            step(*learned, names)
        ours, theirs = other[0].state_dict(), one[0].state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(("modality", "works"), [("image", "masked_image"), ("audio", "masked_audio")])
def test_a_run_that_can_learn_nothing_is_refused_and_told_what_would(modality, works, tmp_path):
    """One kind of data alone, under the preset's objectives."""
    data = tmp_path / "data"
    data.mkdir()
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(picture, "PNG")
    soundfile.write(sound, np.random.default_rng(0).normal(size=8000) / 9, 16000, format="FLAC")
    member = {"image": {"png": picture.getvalue()}, "audio": {"flac": sound.getvalue()}}[modality]
    write_shard(data / "a-0.tar", [{"__key__": f"k{i}", "json": {"split": "train"}, **member} for i in range(4)])
    config = dataclasses.replace(configs.tiny(), data=str(data), steps=2)
    with pytest.raises(ConfigError, match=f"from 4 training samples of {modality}: contrastive needs a concept in two "
                       f"modalities, masked_text needs text, .* try --set objectives.{works}.weight=1"):  # fmt: skip
        train.pretrain(config, tmp_path / "out")
    assert train.pretrain(configs.override(config, (f"objectives.{works}.weight=1",)), tmp_path / "out")
    assert metrics.read(tmp_path / "out" / "metrics.jsonl")[-1]["loss"] > 0


@pytest.mark.parametrize(("apart", "said"), [(True, 1), (False, 0)])
def test_captions_and_pictures_that_are_samples_of_their_own_are_warned_of(apart, said, tmp_path, caplog):
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(picture, "PNG")
    made = []
    for i in range(40):
        members = [{"txt": f"a sea {i}"}, {"png": picture.getvalue()}]
        for j, one in enumerate(members if apart else [members[0] | members[1]]):
            made.append({"__key__": f"k{i}-{j}", "json": {"concept": f"c{i}"}, **one})
    write_shard(tmp_path / "a-0.tar", made)
    config = configs.override(configs.tiny(), ("steps=1", "objectives.matching.weight=0", f"data={tmp_path}"))
    with caplog.at_level(logging.INFO):
        train.pretrain(config, tmp_path / "out")
    lines = [
        line for line in caplog.messages if line.startswith("contrastive learns little in this run: a batch shows 0")
    ]
    assert len(lines) == said


def test_samples_of_one_concept_and_a_modality_that_none_has_are_told(tmp_path, caplog):
    """A `concept` that is the same everywhere: no sample is a wrong answer for another."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(picture, "PNG")
    made = [
        {"__key__": f"k{i}", "txt": f"sea {i}", "png": picture.getvalue(), "json": {"concept": "c"}} for i in range(8)
    ]
    write_shard(tmp_path / "a-0.tar", made)
    config = configs.override(configs.tiny(), ("steps=1", f"data={tmp_path}"))
    with caplog.at_level(logging.INFO):
        train.pretrain(config, tmp_path / "out")
    for name in ("contrastive", "matching"):
        said = f"{name} learns nothing in this run: it compares concepts, and all samples are of one"
        assert said in caplog.messages
    assert "no training sample holds audio: its front end learns nothing in this run" in caplog.messages


def test_an_objective_that_is_never_due_is_named():
    _, learned = objective_learner("objectives.matching.begin=1")
    items, _ = samples()
    assert objectives.idle(learned.objectives, items, 8, 4) == {"matching": "is never due"}
    assert objectives.idle(learned.objectives, [items[3]] * 3, 8, 4).keys() == {"contrastive", "matching"}  # captions


def test_checkpoint_restores_weights_and_optimizer_exactly(tmp_path):
    config, learned = learner()
    optimizer = train.make_optimizer(learned, config)
    items, features = samples()
    batch = batch_of(learned, items, features)

    def step(learned, optimizer):
        return train.train_step(learned, optimizer, batch, learned.prepare(batch, _rng()), config)

    for _ in range(3):
        step(learned, optimizer)
    checkpoint.save(tmp_path, 3, learned, optimizer, {"step": 3, "skipped": 1}, keep=1)
    _, other = learner(seed=5)
    other_optimizer = train.make_optimizer(other, config)
    progress = checkpoint.load(checkpoint.saved(tmp_path)[-1], other, other_optimizer, {"step": 0, "skipped": 0})
    assert progress == {"step": 3, "skipped": 1}
    # the next step tells whether moments and step counts came along
    assert step(learned, optimizer) == step(other, other_optimizer)
    for (name, one), (_, two) in zip(learned.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def _rng():
    return np.random.default_rng(0)


def test_a_step_that_is_not_finite_changes_nothing():
    config, learned = learner()
    optimizer = train.make_optimizer(learned, config)
    items, features = samples()
    batch = batch_of(learned, items, features)
    prepared = learned.prepare(batch, _rng())
    before = {name: p.clone() for name, p in learned.named_parameters()}
    batch.inputs["audio"][0][3] = math.inf
    figures, made = train.train_step(learned, optimizer, batch, prepared, config)
    assert not made
    assert not math.isfinite(figures["grad_norm"])
    assert all(torch.equal(before[name], p) for name, p in learned.named_parameters())


class Reads(TorchDispatchMode):
    """Operators whose result, or its size, the host takes from tensors of numbers that a GPU computes: it would wait.

    A list of several numbers comes in one copy, which is no operator here.  Ids are looked at on the host only.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        number = name == "_local_scalar_dense" and args[0].dtype != torch.int64
        if number or by_mask or name in ("nonzero", "masked_select", "equal", "_unique2"):
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_its_figures_alone():
    """Each other question lets a GPU run dry, since nothing is queued behind the answer."""
    config, learned = learner()
    optimizer = train.make_optimizer(learned, config)
    batch = batch_of(learned, *samples())
    prepared = learned.prepare(batch, _rng())
    assert {"contrastive", "masked_text", "matching"} <= prepared.weights.keys()
    with Reads() as reads:
        figures, made = train.train_step(learned, optimizer, batch, prepared, config)
    assert made
    assert len(figures) > 8
    assert reads.found == []


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_warms_up_and_ends_near_zero(schedule):
    config = dataclasses.replace(configs.tiny(), schedule=schedule, steps=100, warmup_steps=10, lr=1.0)
    rates = [train.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) or schedule == "cosine"
    assert rates[-1] < 0.06
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    if schedule == "wsd":
        assert rates[10:80] == [1.0] * 70


def test_metrics_file_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')  # the last was cut by a kill
    file = metrics.MetricsFile(path, from_step=2)
    file.write({"step": 3, "loss": float("nan")})
    file.close()
    assert metrics.read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


def test_configuration_round_trip_and_overrides():
    for name in configs.PRESETS:
        config = configs.preset(name)
        assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config
    changed = configs.override(
        configs.demo(),
        ("steps=7", "model.width=64", "model.audio.mels=80", "languages=fr,es", "augment=false", "lr=1e-3"),
    )
    assert (changed.steps, changed.model.width, changed.model.audio.mels) == (7, 64, 80)
    assert (changed.languages, changed.augment, changed.lr) == (("fr", "es"), False, 1e-3)
    for wrong in ("step=7", "model.depth=2", "steps", "augment=1", "steps=many", "model=3"):
        with pytest.raises(ValueError, match="config:"):
            configs.override(configs.demo(), (wrong,))

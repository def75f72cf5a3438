"""The loop: a run that was stopped or killed ends in the very weights of one that was not."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import assert_same_run, batch_of, learner, samples

from mmmodel import (
    checkpoint,
    cli,
    configs,
    distributed,
    evaluate,
    metrics,
    train,
    update,
)
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
    original = update.train_step

    def stopping(*args):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), by)
        return original(*args)

    monkeypatch.setattr(update, "train_step", stopping)
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


def test_checkpoint_restores_weights_and_optimizer_exactly(tmp_path):
    config, learned = learner()
    optimizer = update.make_optimizer(learned, config)
    items, features = samples()
    batch = batch_of(learned, items, features)

    def step(learned, optimizer):
        return update.train_step(learned, optimizer, batch, learned.prepare(batch, np.random.default_rng(0)), config)

    for _ in range(3):
        step(learned, optimizer)
    checkpoint.save(tmp_path, 3, learned, optimizer, {"step": 3, "skipped": 1}, keep=1)
    _, other = learner(seed=5)
    other_optimizer = update.make_optimizer(other, config)
    progress = checkpoint.load(checkpoint.saved(tmp_path)[-1], other, other_optimizer, {"step": 0, "skipped": 0})
    assert progress == {"step": 3, "skipped": 1}
    # the next step tells whether moments and step counts came along
    assert step(learned, optimizer) == step(other, other_optimizer)
    for (name, one), (_, two) in zip(learned.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


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

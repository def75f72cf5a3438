"""Values that no run can have: each is one line that names the field, before anything is read or written."""

import dataclasses

import pytest
import torch

from mmkernels import dispatch
from mmmodel import cli, configs, embed, export, limits, train
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.predict import Predictor
from mmmodel.limits import ConfigError, Range
from mmmodel.pretraining import Pretraining

WRONG = (
    ("steps=-1", "steps is -1, expected at least 1"),
    ("steps=0", "steps is 0, expected at least 1"),
    ("batch_size=0", "batch_size is 0, expected at least 1"),
    ("lr=nan", r"lr is nan, expected a number in \(0, 1\]"),
    ("lr=-1", r"lr is -1.0, expected a number in \(0, 1\]"),
    ("clip_norm=inf", "clip_norm is inf, expected at least 0, and finite"),
    ("threads=0", "threads is 0, expected at least 1"),
    ("seed=-1", r"seed is -1, expected a number in \[0, "),
    ("keep_checkpoints=0", "keep_checkpoints is 0, expected at least 1"),
    ("chunk_tokens=-1", "chunk_tokens is -1, expected at least 0"),
    ("precision=fp8", "precision is 'fp8', expected one of fp32, bf16"),
    ("schedule=step", "schedule is 'step', expected one of cosine, wsd"),
    ("device=gpu", "device is 'gpu', expected cpu, cuda or cuda:NUMBER"),
    ("model.width=0", "model.width is 0, expected at least 1"),
    ("model.width=8", "width is 8, expected 8 to 256 times heads, 2"),
    ("model.heads=0", "model.heads is 0, expected at least 1"),
    ("model.norm=none", "model.norm is 'none', expected one of pre, post"),
    ("model.impl=foo", "model.impl is 'foo', expected one of auto, reference"),
    ("model.modalities=text,text", "model.modalities is 'text,text', expected one or more names, each once"),
    ("model.modalities=", "model.modalities is '', expected one or more names"),
    (
        "model.text.vocab_size=259",
        "model.text.vocab_size is 259, expected at least 260: 256 bytes and 4 special tokens",
    ),
    ("model.text.max_tokens=0", "model.text.max_tokens is 0, expected at least 2"),
    ("model.image.max_tokens=0", "model.image.max_tokens is 0, expected at least 1"),
    ("model.image.channels=a,b", "model.image.channels is 'a,b', expected whole numbers with commas"),
    ("model.image.channels=8", "model.image.channels is '8', expected 2 values"),
    ("model.image.channels=8,0", "model.image.channels is '8,0', expected each to be at least 1"),
    ("model.audio.max_seconds=0", "model.audio.max_seconds is 0.0, expected at least 0.04"),
    ("objectives.contrastive.weight=-1", "objectives.contrastive.weight is -1.0, expected at least 0"),
    ("objectives.masked_share=0", r"objectives.masked_share is 0.0, expected a number in \(0, 1\]"),
    ("objectives.contrastive.every=0", "objectives.contrastive.every is 0, expected at least 1"),
    ("objectives.masked_text.probability=7", r"masked_text.probability is 7.0, expected a number in \(0, 1\]"),
    ("steps.x=3", "no field 'steps.x', since steps is one value"),
)


@pytest.mark.parametrize(("assignment", "message"), WRONG, ids=[assignment for assignment, _ in WRONG])
@pytest.mark.parametrize("command", ["pretrain", "complexity"])
def test_a_value_that_cannot_be_is_named(command, assignment, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main([command, "--preset", "tiny", "--set", assignment])
    assert not list(tmp_path.rglob("config.json"))


def test_a_wrong_rule_of_recordings_is_named_before_the_data_is_looked_for(tmp_path):
    wrong = ["--set", "hold_out_speech=es", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="hold_out_speech is 'es', expected a language and a share of it"):
        cli.main(["pretrain", "--preset", "tiny", *wrong])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr", "-1"), r"finetune: lr is -1.0, expected a number in \(0, 1\]"),
        (("--lr", "1000"), "finetune: lr is 1000.0"),
        (("--dropout", "2"), r"finetune: dropout is 2.0, expected a number in \[0, 1\)"),
        (("--epochs", "0"), "finetune: epochs is 0, expected at least 1"),
        (("--device", "gpu"), "finetune: device is 'gpu', expected cpu, cuda or"),
        (("--seed", "-1"), "finetune: seed is -1"),
        (("--partial", "--from-scratch"), "finetune: partial is about weights, of which from_scratch takes none"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_flag_of_finetune_that_cannot_be_is_named(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        cli.main(["finetune", "--from", str(tmp_path), "--out", str(tmp_path / "out"), *flags])


@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_the_model_goes_to_the_device(command, run, tmp_path, monkeypatch):
    """On a machine that may have none: it is sent there before anything is computed."""

    class MovedError(Exception):
        pass

    def moved(learner, device):
        raise MovedError(device)

    monkeypatch.setattr(limits, "check_device", lambda device, who: None)
    monkeypatch.setattr(Pretraining, "to", moved)
    with pytest.raises(MovedError, match="cuda:1"):
        cli.main([command, "--from", str(run), "--out", str(tmp_path / "out"), "--device", "cuda:1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device is there")
def test_a_gpu_that_is_not_there_is_named(tmp_path, capsys):
    there = ["--from", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cuda"]
    gpu = "--set=device=cuda"
    for command in (
        ["finetune", *there],
        ["embed", *there],
        ["predict", *there],
        ["evaluate", *there],
        ["explain", *there],
        ["pretrain", "--out", str(tmp_path / "out"), gpu],
    ):
        with pytest.raises(SystemExit, match=r"device is 'cuda', expected cpu: torch .* sees no GPU here"):
            cli.main(command)
    assert capsys.readouterr().out == ""
    for read in (embed.Embedder, Predictor, export.from_pretrained):
        with pytest.raises(ConfigError, match=r"device is 'cuda', expected cpu: torch .* sees no GPU here"):
            read(tmp_path, device="cuda")


def test_every_preset_and_default_can_be():
    for name in configs.PRESETS:
        limits.check(configs.preset(name), "config")
    limits.check(FinetuneConfig(), "finetune")


def test_the_implementations_are_those_of_the_kernels():
    """All but cuda, which attention has not."""
    taken = [impl for impl in dispatch.IMPLS if not _wrong(impl)]
    assert taken == [impl for impl in dispatch.IMPLS if impl != "cuda"]


def _wrong(impl):
    try:
        limits.check(dataclasses.replace(configs.tiny().model, impl=impl), "config")
    except ConfigError:
        return True
    return False


def test_ends_of_a_range():
    both, open_ = Range(0, 1), Range(0, 1, above=True, below=True)
    assert [both.has(x) for x in (0, 1, -1e-9, 1.1, float("nan"), "1", True)] == [True, True] + [False] * 5
    assert [open_.has(x) for x in (0, 0.5, 1)] == [False, True, False]


def test_python_callers_get_the_same_line(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"steps is 1\.5, expected a whole number"):
        train.pretrain(dataclasses.replace(tiny, steps=1.5), tmp_path)
    with pytest.raises(ConfigError, match=r"config: languages is 'fr', expected a tuple"):
        train.pretrain(dataclasses.replace(tiny, languages="fr"), tmp_path)
    with pytest.raises(ConfigError, match=r"config: model\.modalities is 'text', expected a tuple"):
        train.pretrain(dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, modalities="text")), tmp_path)

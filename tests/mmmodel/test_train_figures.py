"""What a run tells of itself: figures of each step and of the split validation, and what learns nothing."""

import dataclasses
import importlib.util
import io
import logging

import numpy as np
import pytest
import soundfile
import torch
from builders import objective_learner, samples
from PIL import Image
from safetensors.torch import load_file

from mmmodel import (
    configs,
    distributed,
    export,
    held_out,
    metrics,
    objectives,
    plot,
    pretraining,
    train,
    update,
)
from mmmodel.batches import Sampler
from mmmodel.configs import ConfigError
from mmmodel.data.shards import write_shard
from mmmodel.features import Item


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
    original, close = update.train_step, SummaryWriter.close
    monkeypatch.setattr(update, "train_step", lambda *args: (original(*args)[0], next(updated)))
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


def test_data_without_a_validation_split_and_without_sound_says_what_does_nothing(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    made = [{"__key__": f"k{i}", "txt": f"red {i}", "json": {"split": "train"}} for i in range(8)]
    write_shard(tmp_path / "data" / "a-0.tar", made)
    caplog.set_level("INFO")
    config = dataclasses.replace(configs.tiny(), data=str(tmp_path / "data"), steps=2, evaluate_every=1)
    assert train.pretrain(dataclasses.replace(config, hold_out_speech="es:0.5"), tmp_path / "run")
    assert "evaluate_every does nothing in this run: no sample has the split validation" in caplog.messages
    assert "hold_out_speech=es:0.5 finds no recording in the split train to hold out" in caplog.messages
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


@pytest.mark.parametrize(("groups", "ranks", "size"), [(9, 1, 9), (90, 1, 64), (90, 65, 65), (64, 65, 0), (0, 1, 0)])
def test_batches_of_validation_have_a_sample_for_each_process(groups, ranks, size, monkeypatch):
    """Also for more processes than such a batch has samples otherwise; each group of items counts once."""
    monkeypatch.setattr(distributed, "size", lambda: ranks)
    items = [Item(f"k{i}", f"g{i // 2}", "", "c", "validation", {}) for i in range(2 * groups)]
    assert held_out.batch_size(items) == size


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


@pytest.mark.parametrize(
    ("threads", "said"),
    [
        (1, "1 of 2 cores compute: a large model is faster with pretrain --set threads=2"),
        (3, "3 threads wait for each other on 2 cores: it is faster with fewer"),
        (2, None),
    ],
)
def test_threads_that_are_not_the_cores_are_told(tiny, tmp_path, caplog, monkeypatch, one_thread, threads, said):
    monkeypatch.setattr(train.os, "cpu_count", lambda: 2)
    with caplog.at_level(logging.INFO):
        train.pretrain(dataclasses.replace(tiny, steps=1, threads=threads), tmp_path / "out")
    assert [message for message in caplog.messages if " cores" in message] == ([said] if said else [])


@pytest.mark.parametrize(("there", "device", "said"), [(True, "cpu", 1), (False, "cpu", 0), (True, "cuda", 0)])
def test_a_gpu_that_is_not_taken_is_told(tiny, caplog, monkeypatch, there, device, said):
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: there)
    with caplog.at_level(logging.INFO):
        train._tell_of_hardware(tiny, torch.device(device))
    assert len([message for message in caplog.messages if "pretrain --set device=cuda" in message]) == said


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


@pytest.mark.parametrize("end", [b"", b"\0\xff\n"], ids=["killed", "power cut"])
def test_metrics_file_drops_what_will_be_done_again(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste' + end)
    file = metrics.MetricsFile(path, from_step=2)
    file.write({"step": 3, "loss": float("nan")})
    file.close()
    assert metrics.read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]

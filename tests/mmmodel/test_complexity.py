"""The report is held to what PyTorch counts on a real step: parameters, FLOPs, and memory."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train_step_memory import peak_memory
from mmmodel import cli, complexity, configs
from mmmodel.batches import collate
from mmmodel.complexity import SampleShape, SavedBytes
from mmmodel.configs import ConfigError, MaskedConfig, MatchingConfig, MeaningConfig, ObjectivesConfig
from mmmodel.features import Features, Item
from mmmodel.frontends import special_names
from mmmodel.pretraining import Pretraining

MEMORY_FACTOR = 1.25  # estimate over measured, either way

EVERYTHING = ObjectivesConfig(
    masked_share=0.5,
    masked_image=MaskedConfig(weight=0.1, probability=0.5),
    masked_audio=MaskedConfig(weight=0.1, probability=0.4, span=4),
    matching=MatchingConfig(weight=0.1, share=0.5),
    meaning=MeaningConfig(weight=0.1, width=40),
)


def cases():
    tiny, quick = configs.tiny(), dataclasses.replace(configs.quick(), batch_size=8)
    without_sound = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, modalities=("text", "image")),
                                        objectives=ObjectivesConfig())  # fmt: skip
    return {
        "tiny": (tiny, SampleShape(11, (2, 3), 37)),  # frames that are no multiple of the stride
        "quick": (quick, SampleShape(20, (4, 4), 150)),
        "every objective": (dataclasses.replace(quick, objectives=EVERYTHING), SampleShape(20, (4, 4), 150)),
        "two modalities": (without_sound, SampleShape(9, (1, 2), 0)),
    }


@pytest.fixture(scope="module", params=cases())
def case(request):
    config, shape = cases()[request.param]
    learner = Pretraining(
        config, complexity._vocabulary(config.model.text.vocab_size, special_names(config.model.modalities))
    )
    batch = uniform(learner, shape)
    if "meaning" in learner.objectives:
        concepts = batch.concept.unique()
        learner.objectives["meaning"].teach(concepts, torch.randn(len(concepts), config.objectives.meaning.width))
    last = config.steps - 2  # even: every objective runs there
    return complexity.complexity(config, shape), learner, batch, learner.prepare(batch, np.random.default_rng(0), last)


def uniform(learner, shape):
    """A batch of samples of one shape, each of a concept of its own."""
    config, rng = learner.config, np.random.default_rng(0)
    make = {
        "text": lambda: np.array([0, *rng.integers(4, config.model.text.vocab_size, shape.text - 1)], np.int32),
        "image": lambda: rng.integers(0, 256, (3, 16 * shape.image[0], 16 * shape.image[1]), dtype=np.uint8),
        "audio": lambda: rng.normal(size=(shape.audio, config.model.audio.mels)).astype(np.float16),
    }
    names, count = config.model.modalities, config.batch_size
    features = Features.of({name: [make[name]() for _ in range(count)] for name in names})
    items = [Item(f"k{i}", f"g{i}", "", f"c{i}", "train", dict.fromkeys(names, i)) for i in range(count)]
    return collate(items, features, learner.model.front_ends, learner.model.special_tokens)


def test_parameters_are_exact_part_by_part(case):
    report, learner, _, _ = case
    assert report.parameters == sum(p.numel() for p in learner.parameters())
    counts = {cost.part: cost.parameters for cost in report.costs}
    for name, front_end in learner.model.front_ends.items():
        assert counts[f"front end: {name}"] == sum(p.numel() for p in front_end.parameters())
    for name, objective in learner.objectives.items():
        assert counts[f"objective: {name}"] == sum(p.numel() for p in objective.parameters())


def test_flops_equal_torchs_counter(case):
    report, learner, batch, prepared = case
    with FlopCounterMode(display=False) as forward:
        loss, _ = learner(batch, prepared)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert report.forward == pytest.approx(forward.get_total_flops(), rel=1e-3)
    assert report.step == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=1e-3)


def test_memory_kept_for_backward_is_within_the_factor(case):
    report, learner, batch, prepared = case
    with (saved := SavedBytes(learner)):
        learner(batch, prepared)
    assert 1 / MEMORY_FACTOR < report.saved_bytes / saved.total < MEMORY_FACTOR


def test_peak_of_a_step_is_within_the_factor(case):
    """What the allocator held at most during a step, beyond weights and averages, which were there before."""
    report, learner, batch, prepared = case
    optimizer = torch.optim.AdamW(learner.parameters(), fused=True)

    def step():
        loss, _ = learner(batch, prepared)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gradients = complexity.FLOAT * report.parameters
    peak = peak_memory(step, torch.device("cpu"))
    assert 1 / MEMORY_FACTOR < (report.saved_bytes + gradients) / peak < MEMORY_FACTOR


@pytest.mark.parametrize("name", ["demo", "stamps", "native", "base"])
def test_the_command_prints_every_part_of_a_preset(name, capsys):
    """At once, whatever the size: nothing is allocated."""
    cli.main(["complexity", "--preset", name])
    out = capsys.readouterr().out
    report = complexity.complexity(configs.preset(name))
    assert f"{report.parameters:,}" in out
    assert all(cost.part in out for cost in report.costs)
    assert "not counted" not in out


def test_a_smaller_sample_costs_less_and_a_missing_modality_nothing():
    config = configs.demo()
    longest = complexity.complexity(config)
    short = complexity.complexity(config, SampleShape(10, (3, 3), 100))
    no_sound = complexity.complexity(config, SampleShape(10, (3, 3), 0))
    assert longest.step > short.step > no_sound.step
    assert next(c for c in no_sound.costs if c.part == "front end: audio").forward == 0


def test_limits_are_named():
    with pytest.raises(ConfigError, match="complexity: text has 97 tokens or frames, expected 0 to 96"):
        complexity.complexity(configs.demo(), SampleShape(97, (1, 1), 10))


def test_what_keeps_less_for_backward_is_named_where_it_is_used(capsys):
    config, shape = cases()["tiny"]
    for change, said in (
        ({}, ""),
        ({"precision": "bf16"}, "this configuration's bf16"),
        ({"precision": "bf16", "chunk_tokens": 64}, "this configuration's bf16 and chunk_tokens"),
    ):
        complexity.show(complexity.complexity(dataclasses.replace(config, **change), shape))
        _, found, named = " ".join(capsys.readouterr().out.split()).partition(
            "less than that is kept for backward with "
        )
        assert (named if found else "") == said


def test_what_is_not_known_is_said(capsys):
    """A modality without a formula is listed, and adds no tokens that it does not have."""
    config = configs.tiny()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, modalities=("text", "image", "video")))
    config = dataclasses.replace(config, objectives=ObjectivesConfig())
    report = complexity.complexity(config, SampleShape(9, (1, 2), 37))
    assert next(c for c in report.costs if c.part == "front end: video").forward is None
    complexity.show(report)
    out = capsys.readouterr().out
    assert "not counted: FLOPs and memory of front end: video" in out
    assert "no tokens in this sample: video" in out
    two = dataclasses.replace(config, model=dataclasses.replace(config.model, modalities=("text", "image")))
    assert complexity.complexity(two, SampleShape(9, (1, 2), 0)).saved_bytes <= report.saved_bytes

"""Matching: its pairs, its loss and gradients, and that a negative is never a true match."""

import dataclasses

import numpy as np
import pytest
import torch
from builders import batch_of, objective_learner, samples

from mmkernels.ops.packing.api import segment_mean
from mmmodel import complexity, configs
from mmmodel.configs import ConfigError
from mmmodel.objectives.matching import draw_pairs, named_pairs, pair_streams

ALL = ("text", "image", "audio")
PRESENT = (ALL, ("image",), ("text", "audio"), ("text", "image"), ALL, ALL)


def matched(*assignments, concepts=None, seed=0):
    _, learned = objective_learner("objectives.matching.share=1", *assignments)
    items, features = samples(seed=seed, present=PRESENT)
    if concepts is not None:
        items = [dataclasses.replace(item, concept=concept) for item, concept in zip(items, concepts, strict=True)]
    batch = batch_of(learned, items, features)
    return learned, batch, learned.objectives["matching"].prepare(batch, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("classes", [2, 4])  # most of the batch is a true match; few are
def test_a_negative_is_never_a_true_match(seed, classes):
    """Not even where the scores say that nothing else could be: true matches score a thousand above the rest."""
    rng = np.random.default_rng(seed)
    _, batch, anchors = matched(concepts=[f"c{c}" for c in rng.integers(classes, size=6)], seed=seed)
    concept, modality = batch.concept.numpy(), batch.modality.numpy()
    scores = 1000.0 * (concept[:, None] == concept[None, :])
    drawn = 0
    for (a, b), one in zip([(1, 0), (2, 0)], anchors, strict=True):
        pairs = draw_pairs(one, scores)
        assert (modality[pairs[:, 0]] == a).all()
        assert (modality[pairs[:, 1]] == b).all()
        negative = pairs[:, 2] == 0
        assert (concept[pairs[negative, 0]] != concept[pairs[negative, 1]]).all()
        assert (concept[pairs[~negative, 0]] == concept[pairs[~negative, 1]]).all()
        sample = batch.layout.segments[:, 0]
        assert (sample[pairs[~negative, 0]] == sample[pairs[~negative, 1]]).all()
        drawn += negative.sum()
    assert drawn > 0 or len(set(concept)) == 1


def test_one_concept_has_no_negatives():
    _, _, anchors = matched(concepts=["c"] * 6)
    for one in anchors:
        assert (draw_pairs(one, None)[:, 2] == 1).all()


@pytest.mark.parametrize("hardness", [1.0, 0.3])
def test_negatives_are_drawn_by_the_softmax_of_the_scores(hardness):
    """Frequencies over many draws against the probabilities; the bound is five standard deviations."""
    _, batch, anchors = matched(concepts=[f"c{i}" for i in range(6)])
    one = anchors[0]
    scores = np.random.default_rng(0).normal(size=(len(batch.concept),) * 2)
    rng, draws = np.random.default_rng(1), 4000
    counts = np.zeros((len(one.first), len(one.all_second)))
    for _ in range(draws):
        noisy = dataclasses.replace(one, noise_second=rng.gumbel(size=one.noise_second.shape))
        pairs = draw_pairs(noisy, scores, hardness)[len(one.first) : 2 * len(one.first)]
        counts[np.arange(len(one.first)), np.searchsorted(one.all_second, pairs[:, 1])] += 1
    allowed = batch.concept.numpy()[one.first][:, None] != batch.concept.numpy()[one.all_second][None, :]
    expected = np.exp(hardness * scores[np.ix_(one.first, one.all_second)]) * allowed
    expected /= expected.sum(axis=1, keepdims=True)
    assert (np.abs(counts / draws - expected) < 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12).all()


def test_pairs_are_packed_as_samples_of_their_own():
    """A pair reads the rows of its two segments, also where a segment stands in several pairs."""
    learned, batch, _ = matched()
    streams = learned.model.streams(batch)
    image, text = (np.flatnonzero(batch.modality.numpy() == m) for m in (1, 0))
    pairs = np.array([(i, t) for i in image[:3] for t in text[::-1][:2]])
    gathered, layout = pair_streams(streams, batch, pairs)
    assert layout.stream_lengths == tuple(len(stream) for stream in gathered)
    together = segment_mean(learned.model.encode(gathered, layout), layout)
    for n, (i, t) in enumerate(pairs):
        alone, own = pair_streams(streams, batch, np.array([(i, t)]))
        expected = segment_mean(learned.model.encode(alone, own), own)
        torch.testing.assert_close(together[2 * n : 2 * n + 2], expected, atol=1e-5, rtol=1e-5)
    rows = gathered[0][: len(batch.features["text"][-1])]
    assert rows.tolist() == batch.features["text"][-1].tolist()


def test_loss_and_gradients_against_the_plain_definition():
    """Binary cross entropy written out, in float64, one pair at a time."""
    learned, _, _ = matched()
    objective = learned.objectives["matching"].double()
    torch.manual_seed(0)
    a, b = (torch.randn(5, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    loss, metrics = objective.loss(a, b, labels)
    plain, right = 0, {0: [], 1: []}
    for one, other, label in zip(a, b, labels, strict=True):
        features = torch.cat([one, other, one * other])
        hidden = objective.dense.weight @ features + objective.dense.bias
        hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        p = 1 / (1 + torch.exp(-(objective.out.weight[0] @ hidden + objective.out.bias[0])))
        plain = plain - (label * p.log() + (1 - label) * (1 - p).log()) / 5
        right[int(label)].append(float((p > 2 / 5) == (label > 0.5)))  # two of five match
    torch.testing.assert_close(loss, plain)
    leaves = [a, b, *objective.parameters()]
    for ours, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(ours, expected)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean([np.mean(right[0]), np.mean(right[1])]))


def test_gradients_reach_the_front_ends_but_not_the_scores():
    """Hard negatives are drawn from the contrastive points, which learn nothing from being drawn."""
    learned, batch, _ = matched("objectives.contrastive.weight=1", "objectives.masked_text.weight=0")
    prepared = learned.prepare(batch, np.random.default_rng(0))
    only = dataclasses.replace(prepared, weights={"contrastive": 0.0, "matching": 1.0})
    loss, figures = learned(batch, only)
    loss.backward()
    assert figures["matching/loss"] > 0
    assert learned.model.front_ends["image"].stages[0].conv.weight.grad.abs().sum() > 0
    assert learned.objectives["contrastive"].heads.grad.abs().sum() == 0


@pytest.mark.parametrize("pair", ["image", "image-image", "image-video"])
def test_pairs_that_cannot_be_are_refused(pair):
    with pytest.raises(ConfigError, match=f"pairs is '{pair}', expected pairs of text, image, audio joined by -"):
        objective_learner(f"objectives.matching.pairs={pair}")


def test_of_the_default_pairs_those_stay_that_the_model_reads():
    def pairs(*fields):
        return named_pairs(configs.override(configs.tiny(), fields))

    assert pairs("model.modalities=text,image,video") == [("image", "text")]
    assert complexity.complexity(configs.override(configs.tiny(), ("model.modalities=text,image,video",))).step > 0
    with pytest.raises(ConfigError, match=r"objectives.matching.weight=0 leaves matching out"):
        pairs("model.modalities=text,video")
    with pytest.raises(ConfigError, match="pairs is 'image-text,audio-image', expected pairs of text, image joined"):
        pairs("model.modalities=text,image", "objectives.matching.pairs=image-text,audio-image")

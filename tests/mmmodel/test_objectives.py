"""Losses against plain definitions, and what is masked."""

import itertools
import math

import numpy as np
import pytest
import torch
from builders import batch_of, learner, objective_learner, samples

from mmmodel.features import Features
from mmmodel.objectives.contrastive import MAX_SCALE, multi_positive, top1
from mmmodel.objectives.masked_text import mask_text


def plain_info_nce(points_a, points_b, concepts_a, concepts_b, scale):
    """Mean over queries with a positive of -mean over positives of log softmax; one loop per query."""
    losses = []
    for point, concept in zip(points_a, concepts_a, strict=True):
        scores = [torch.exp(scale * (point @ other)) for other in points_b]
        positives = [s for s, c in zip(scores, concepts_b, strict=True) if c == concept]
        if positives:
            losses.append(-sum(torch.log(s / sum(scores)) for s in positives) / len(positives))
    return sum(losses) / len(losses)


def test_contrastive_loss_and_gradients_against_the_plain_definition():
    """Several positives per query, queries without any, and modalities of different counts."""
    torch.manual_seed(0)
    _, learned = learner()
    objective = learned.objectives["contrastive"].double()
    modality = torch.tensor([0, 1, 2, 0, 2, 1, 0, 1])
    concept = torch.tensor([0, 0, 0, 1, 1, 0, 2, 3])
    points = torch.nn.functional.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1).requires_grad_()
    scale = objective.log_scale[0].exp()
    expected = []
    for a, b in itertools.combinations(range(3), 2):
        part = {m: (points[modality == m], concept[modality == m].tolist()) for m in (a, b)}
        one = plain_info_nce(part[a][0], part[b][0], part[a][1], part[b][1], scale)
        two = plain_info_nce(part[b][0], part[a][0], part[b][1], part[a][1], scale)
        expected.append((one + two) / 2)
    loss, metrics = objective.loss(points, modality, concept)
    plain = sum(expected) / 3
    torch.testing.assert_close(loss, plain)
    leaves = [points, objective.log_scale]
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert {"loss/text-image", "loss/text-audio", "loss/image-audio"} < set(metrics)


def test_the_scale_is_limited():
    _, learned = learner()
    objective = learned.objectives["contrastive"]
    with torch.no_grad():
        objective.log_scale.fill_(6.0)
    assert objective.scale() == MAX_SCALE


def test_top1_counts_the_rows_that_have_a_positive():
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    same = torch.tensor([[True, False], [False, True], [False, False]])
    assert top1(logits, same, torch.tensor([0, 1])) == 0.5
    assert top1(logits[:2], same[:2], None) == 0.5


def test_a_perfect_match_costs_what_several_positives_must():
    """log(number of positives): the softmax cannot give each of two equal answers more than a half."""
    same = torch.tensor([[True, True, False], [False, False, True]])
    logits = torch.where(same, 50.0, -50.0)
    assert float(multi_positive(logits, same, None)) == pytest.approx(math.log(2) / 2)


def test_nothing_to_align_is_a_zero_that_can_be_differentiated():
    _, learned = learner()
    points = torch.nn.functional.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    loss, _ = learned.objectives["contrastive"].loss(points, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.item() == 0
    assert float(points.grad.abs().sum()) == 0


def test_head_is_the_normalised_map_of_the_mean_token():
    _, learned = learner()
    items, features = samples()
    batch = batch_of(learned, items, features)
    objective = learned.objectives["contrastive"]
    packed = torch.randn(batch.layout.total_tokens, 16)
    points = objective.points(packed, batch.layout, batch.modality)
    bounds = batch.layout.segment_cu_seqlens.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        mapped = packed[start:end].mean(0) @ objective.heads[batch.modality[i]]
        torch.testing.assert_close(points[i], mapped / mapped.norm())


@pytest.mark.parametrize("name", ["text", "image", "audio"])
def test_a_segment_is_read_alone_for_its_point(name):
    """Alignment would be solved by looking if a caption saw its picture: what the others hold changes no bit of it."""
    _, learned = learner()
    items, features = samples()

    def points(features):
        batch, views = batch_of(learned, items, features), []
        hook = learned.objectives["contrastive"].register_forward_hook(lambda _, args, out: views.append(args[0]))
        with torch.no_grad():
            learned(batch, learned.prepare(batch, np.random.default_rng(0)))
        hook.remove()
        return views[0].points, batch.modality

    before, modality = points(features)
    flat = {n: v.copy() for n, v in features.flat.items()}
    flat[name][...] = (flat[name] + 3).astype(flat[name].dtype)
    after, _ = points(Features(flat, features.shapes))
    own = modality == list(learned.model.front_ends).index(name)
    assert torch.equal(before[~own], after[~own])
    assert not torch.equal(before[own], after[own])


def test_masking_hides_the_right_share_and_never_the_first():
    rng = np.random.default_rng(0)
    lengths = [1, 2, 5, 41, 101]  # only [CLS]; one word; longer
    ids = np.concatenate([[0, *rng.integers(4, 300, n - 1)] for n in lengths])
    firsts = np.cumsum([0, *lengths[:-1]])
    counts, kinds = [], np.zeros(3)
    for _ in range(200):
        masked, hidden = mask_text(
            ids, lengths, rng, probability=0.3, span=1, mask_id=3, special=np.arange(4), vocab_size=300
        )
        assert not np.isin(firsts, hidden).any()
        assert len(np.unique(hidden)) == len(hidden)
        untouched = np.setdiff1d(np.arange(len(ids)), hidden)
        np.testing.assert_array_equal(masked[untouched], ids[untouched])
        assert (masked[hidden] >= 3).all()  # [MASK] or an ordinary token
        counts.append(len(hidden))
        kinds += [(masked[hidden] == 3).sum(), (masked[hidden] == ids[hidden]).sum(), len(hidden)]
    assert set(counts) == {0 + 1 + 1 + 12 + 30}
    assert kinds[0] / kinds[2] == pytest.approx(0.8, abs=0.02)
    assert kinds[1] / kinds[2] == pytest.approx(0.1, abs=0.02)


def test_masked_text_reads_the_hidden_rows_of_the_packed_sequence():
    """The rows it gathers hold the tokens that it must guess, whatever else stands between the captions."""
    _, learned = learner()
    items, features = samples()
    batch = batch_of(learned, items, features)
    masked = learned.prepare(batch, np.random.default_rng(1)).masked
    layout, rows, targets = masked.layout, masked.packed_rows["text"], masked.targets["text"]
    assert (layout.modality_ids[rows] == 0).all()
    stream_rows = layout.source_rows[rows].long()
    assert torch.equal(stream_rows, masked.stream_rows["text"])
    assert torch.equal(batch.inputs["text"][0][stream_rows], targets)
    ids = masked.inputs["text"][0]
    unchanged = torch.ones(len(ids), dtype=torch.bool)
    unchanged[stream_rows] = False
    assert torch.equal(ids[unchanged], batch.inputs["text"][0][: len(ids)][unchanged])


def test_masked_text_loss_and_gradients_against_plain_cross_entropy():
    torch.manual_seed(0)
    _, learned = learner()
    objective = learned.objectives["masked_text"].double()
    hidden, table = (torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (7, 280))
    targets = torch.randint(0, 280, (7,))
    loss, _ = objective.loss(hidden, targets, table)
    x = torch.nn.functional.gelu(hidden @ objective.dense.weight.t() + objective.dense.bias, approximate="tanh")
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = x @ table.t() + objective.bias
    expected = -(logits - logits.logsumexp(1, keepdim=True))[torch.arange(7), targets].mean()
    torch.testing.assert_close(loss, expected)
    leaves = [hidden, table, objective.dense.weight, objective.dense.bias, objective.bias]
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_share_of_the_batch_is_a_prefix():
    _, learned = objective_learner("objectives.masked_share=0.5")
    items, features = samples()
    batch = batch_of(learned, items, features)
    prepared = learned.prepare(batch, np.random.default_rng(0))
    assert prepared.masked.layout.num_samples == 3
    loss, _ = learned(batch, prepared)
    assert torch.isfinite(loss)


def test_samples_with_nothing_to_align_to_read_or_to_match_cost_nothing():
    _, learned = learner()
    items, features = samples(present=(("image",), ("audio",)))
    batch = batch_of(learned, items, features)
    loss, _ = learned(batch, learned.prepare(batch, np.random.default_rng(0)))
    loss.backward()
    assert loss.item() == 0

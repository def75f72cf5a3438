"""Mass and rollout against dense references written out by hand; every row is a distribution."""

import math

import pytest
import torch
from builders import batch_of, learner, samples

from mmkernels.ops.attention.api import attention
from mmmodel.explaining.attention import modality_mass, projections, rollout
from mmmodel.explaining.sample import Sample, tokens_of


def dense(model, batch):
    """Attention probabilities of one sample, layer by layer, float64 [H, n, n]: the model run step by step."""
    n, layers = batch.layout.total_tokens, []
    with torch.no_grad():
        x = model.embedding(model.streams(batch), batch.layout)
        for block in model.blocks:
            qkv = block.qkv(block.norm_attention(x)).double().view(n, 3, block.heads, -1)
            weights = torch.zeros(block.heads, n, n, dtype=torch.float64)
            for h in range(block.heads):
                for i in range(n):
                    scores = torch.stack([qkv[i, 0, h] @ qkv[j, 1, h] for j in range(n)]) / math.sqrt(qkv.shape[-1])
                    weights[h, i] = scores.softmax(0)
            layers.append(weights)
            x = block(x, batch.layout, None)
    return layers


def one(learned, number=0):
    items, features = samples()
    return Sample(items[number], features).batch(learned.model)


@pytest.mark.parametrize("number", [0, 2, 1])  # all modalities, two, one
def test_mass_equals_the_dense_reference_and_sums_to_one(number):
    _, learned = learner()
    batch = one(learned, number)
    mass = modality_mass(learned.model, batch)
    tokens = tokens_of(learned.model, batch)
    for layer, weights in enumerate(dense(learned.model, batch)):
        for m, reader in enumerate(learned.model.front_ends):
            if reader not in tokens:
                assert mass[layer, :, m].isnan().all()
                continue
            for k, read in enumerate(learned.model.front_ends):
                expected = weights[:, tokens[reader]][:, :, tokens[read]].sum(2).mean(1) if read in tokens else 0
                assert (mass[layer, :, m, k] - expected).abs().max() < 1e-5
    present = [list(learned.model.front_ends).index(name) for name in tokens]
    assert (mass[:, :, present].sum(-1) - 1).abs().max() < 1e-5


def test_mass_of_a_batch_is_over_all_its_samples():
    _, learned = learner()
    mass = modality_mass(learned.model, batch_of(learned, *samples()))
    assert mass.shape == (2, 2, 3, 3)
    assert (mass.sum(-1) - 1).abs().max() < 1e-5


def test_rollout_equals_the_dense_reference_and_rows_sum_to_one():
    _, learned = learner()
    batch = one(learned)
    n = batch.layout.total_tokens
    expected = torch.eye(n, dtype=torch.float64)
    for weights in dense(learned.model, batch):
        mixed = torch.zeros(n, n, dtype=torch.float64)
        for head in weights:
            mixed += head / len(weights)
        expected = (0.5 * mixed + 0.5 * torch.eye(n, dtype=torch.float64)) @ expected
    found = rollout(learned.model, batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(n, dtype=torch.float64), atol=1e-12, rtol=0)


def test_projections_are_what_the_model_attends_with():
    """The attention they give is, bit by bit, what reaches each block's output map."""
    _, learned = learner()
    batch, seen = one(learned), []
    handles = [
        block.out.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0])) for block in learned.model.blocks
    ]
    for qkv in projections(learned.model, batch):
        with torch.no_grad():
            assert torch.equal(attention(*qkv.unbind(1), layout=batch.layout).flatten(1), seen[0])
        del seen[0]
    for handle in handles:
        handle.remove()


def test_refuses_what_it_would_get_wrong():
    _, learned = learner()
    with pytest.raises(ValueError, match="the batch has 6 samples, expected 1"):
        rollout(learned.model, batch_of(learned, *samples()))

"""Attention dropout on CPU: its mask depends on the seed alone, repeats under recomputation, and has the right rate.

The mask is read off the output: with q = 0 all probabilities are equal, and with v the unit matrix out[i, h, j] is the
probability of key j.
"""

import pytest
import torch
from attention_oracle import CPU_IMPLS, Case
from torch.utils.checkpoint import checkpoint

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.ops.attention.reference import dropout_keep

IMPLS = [*CPU_IMPLS, "reference"]
LAYOUT = PackedLayout.from_counts([[100, 7], [0, 0], [64, 85]])  # 256 tokens, as many as D may have
HEADS = 4


def _probabilities(dropout_p, impl, mask=None, seed=0):
    """[H, T, T] after dropout."""
    T = LAYOUT.total_tokens
    q, k = torch.zeros(T, HEADS, T), torch.randn(T, 1, T)
    v = torch.eye(T).unsqueeze(1)
    torch.manual_seed(seed)
    return attention(q, k, v, layout=LAYOUT, mask=mask, dropout_p=dropout_p, impl=impl).transpose(0, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_dropped_is_what_the_definition_drops(impl):
    for mask in (None, AttentionMask(causal=True), AttentionMask.isolated(2)):
        before, after = _probabilities(0.0, impl, mask), _probabilities(0.3, impl, mask)
        torch.manual_seed(0)
        rng = torch.randint(2**63 - 1, (2,))
        head, query, key = (torch.arange(n) for n in after.shape)
        keep = dropout_keep(rng, head[:, None, None], query[:, None], key, 0.3)
        torch.testing.assert_close(after, torch.where(keep, before / 0.7, 0.0))


@pytest.mark.parametrize("dropout_p", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_keep_rate(impl, dropout_p):
    seen = _probabilities(0.0, impl) > 0
    kept = (_probabilities(dropout_p, impl) > 0)[seen].double()
    deviation = (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - dropout_p)) < 4 * deviation
    # No head, query or key is dropped more than others: columns are the marginal that a wrong counter would spoil.
    kept = (_probabilities(0.5, impl) > 0).double()
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        n = seen.sum(others).double()
        rate = kept.sum(others) / n
        assert ((rate - 0.5).abs() < 5 * 0.5 / n.sqrt()).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_expectation_is_the_output_without_dropout(impl):
    layout = PackedLayout.from_counts([[9, 4], [5, 0]])
    q, k, v = torch.randn(18, 3, 2, 16).unbind(1)
    expected = attention(q, k, v, layout=layout, impl=impl)
    draws = torch.stack([attention(q, k, v, layout=layout, dropout_p=0.4, impl=impl) for _ in range(400)])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 400**0.5)
    assert float(error.max()) < 5  # standard deviations, of 576 values
    assert float(error.square().mean()) < 1.5


@pytest.mark.parametrize("impl", IMPLS)
def test_seeds(impl):
    first, again, other = (_probabilities(0.5, impl, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first > 0, other > 0)
    torch.manual_seed(0)
    q = torch.randn(256, 4, 16)
    one, two = (attention(q, q, q, layout=LAYOUT, dropout_p=0.5, impl=impl) for _ in range(2))
    assert not torch.equal(one, two)  # the next call of a model draws another mask


def test_implementations_draw_the_same_mask():
    masks = [_probabilities(0.25, impl) > 0 for impl in IMPLS]
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpoint_repeats_the_mask(impl):
    case = Case(PackedLayout.from_counts([[9, 4], [5, 0]]), None, heads=4, kv_heads=2, pair_bias=True)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]

    def block(*leaves):
        q, k, v, bias = case.arguments(leaves)
        return attention(q, k, v, layout=case.layout, pair_bias=bias, dropout_p=0.5, impl=impl)

    results = []
    for run in (block, lambda *leaves: checkpoint(block, *leaves, use_reentrant=False)):
        torch.manual_seed(3)
        out = run(*leaves)
        torch.randn(7)  # the generator has moved on when backward computes the block again
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_goes_through_the_kept_alone(impl):
    T = LAYOUT.total_tokens
    q, k = torch.zeros(T, 1, T), torch.zeros(T, 1, T)
    v = torch.randn(T, 1, T, requires_grad=True)
    torch.manual_seed(0)
    out = attention(q, k, v, layout=LAYOUT, dropout_p=0.5, impl=impl)
    (dv,) = torch.autograd.grad(out[0, 0, 0], v)
    torch.manual_seed(0)
    rng = torch.randint(2**63 - 1, (2,))
    keep = dropout_keep(rng, *torch.tensor([[0], [0]]), torch.arange(107), 0.5)
    torch.testing.assert_close(dv[:107, 0, 0], keep / (107 * 0.5))

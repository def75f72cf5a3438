"""A sample's outputs and gradients do not depend on the others, whatever they hold, nor on when they are computed.

1,000 layouts for each CPU implementation; no oracle is needed, so they are cheap.
"""

import pytest
import torch
from attention_oracle import CPU_IMPLS, CROSS_MASKS, MASKS, Case, shared_layout

from mmkernels import AttentionMask, PackedLayout, attention
from mmkernels.testing import poisoned_empty

FEATURES = ({}, {"dropout_p": 0.2, "pair_bias": True}, {})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(2, 2, 16), (4, 2, 8), (3, 1, 24)]
LONGEST = (12, 12, 12, 12, 12, 40, 150)  # the last is several tiles, bands and panels


def _results(case, impl, *, poison=None, sample=None):
    """out, lse, mass and gradients of one sample's queries and keys, with `poison` in all others."""
    leaves, gradients = [leaf.clone() for leaf in case.leaves], [g.clone() for g in case.gradients]
    rows, keys = (slice(*side.cu_seqlens[sample : sample + 2].tolist()) for side in (case.layout, case.keys))
    if poison is not None:
        of_queries, of_keys = leaves[0], leaves[0 if case.k_layout is None else 1]  # the same in self-attention
        for t, own in ((of_queries, rows), (of_keys, keys), (gradients[0], rows), (gradients[1].T, rows)):
            t[: own.start], t[own.stop :] = poison, poison
    leaves = [leaf.requires_grad_() for leaf in leaves]
    q, k, v, bias = case.arguments(leaves)
    torch.manual_seed(case.seed)
    out, lse, mass = attention(
        q, k, v, layout=case.layout, k_layout=case.k_layout, mask=case.mask, pair_bias=bias, dropout_p=case.dropout_p,
        return_lse=True, return_modality_mass=True, impl=impl,
    )  # fmt: skip
    outputs, weights = [out], gradients[:1]
    if case.seed % 2:  # half of them with a gradient through lse
        outputs, weights = [out, lse], gradients
    dq, dk, dv, _ = case.arguments(torch.autograd.grad(outputs, leaves, weights))
    return out[rows], lse[:, rows], mass[rows], dq[rows], dk[keys], dv[keys]


@pytest.mark.parametrize("kind", [*MASKS, *(f"cross_{kind}" for kind in CROSS_MASKS)])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_samples_are_isolated_bit_for_bit(impl, kind):
    for seed in range(63):
        cross = kind.startswith("cross_")
        longest = LONGEST[seed % len(LONGEST)]
        layout = shared_layout(seed, longest)
        k_layout = shared_layout(seed + 100, longest) if cross else None
        mask = CROSS_MASKS[kind.removeprefix("cross_")](layout, seed) if cross else MASKS[kind](layout, seed)
        heads, kv_heads, width = SHAPES[seed % len(SHAPES)]
        case = Case(
            layout, mask, k_layout, heads, kv_heads, width, DTYPES[seed // 3 % 3], seed=seed, **FEATURES[seed // 9 % 3]
        )
        sample = seed % layout.num_samples
        with poisoned_empty():
            clean = _results(case, impl, sample=sample)
            # Finite: 1e30, in fp16 half of its largest value.
            for poison in (3e4 if case.dtype == torch.float16 else 1e30, float("nan")):
                spoilt = _results(case, impl, poison=poison, sample=sample)
                assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True)), (seed, poison)


# Equal samples and segments, which may be computed together; ragged ones; a mask with keys in several runs.
@pytest.mark.parametrize(
    ("counts", "mask"),
    [
        ([[6, 9]] * 4, AttentionMask.isolated(2)),
        ([[30, 5], [0, 7], [41, 0]], AttentionMask(visible=[[1, 1], [0, 1]], causal=True)),
        ([[90, 0], [20, 20]], AttentionMask(window=(9, 9))),
    ],
    ids=["equal", "ragged", "window"],
)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_thousand_repeats_are_bit_equal(impl, extras, counts, mask):
    # 1,000 for each implementation over the cases, a few with two threads, because orders may differ between threads.
    layout = PackedLayout.from_counts(counts)
    options = {"pair_bias": True, "dropout_p": 0.1} if extras else {}
    case = Case(layout, mask, heads=4, kv_heads=2, **options)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    q, k, v, bias = case.arguments(leaves)
    threads, first = torch.get_num_threads(), None
    try:
        for i in range(167):
            torch.set_num_threads(2 if i < 5 else 1)
            torch.manual_seed(0)
            out, lse = attention(
                q, k, v, layout=layout, mask=mask, pair_bias=bias, dropout_p=case.dropout_p, return_lse=True,
                deterministic=True, impl=impl,
            )  # fmt: skip
            results = (out, lse, *torch.autograd.grad((out, lse), leaves, case.gradients))
            first = results if first is None else first
            assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    finally:
        torch.set_num_threads(threads)

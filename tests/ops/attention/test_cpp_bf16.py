"""attention in C++ in bf16: what the error rule leaves open, found by mutations of the kernels."""

import pytest
import torch
from attention_oracle import Case, check, dense_oracle

from mmkernels import AttentionMask, PackedLayout, attention, dispatch
from mmkernels.testing import poisoned_empty

pytestmark = pytest.mark.skipif(dispatch.cpp_missing() is not None, reason="the extension is not built")

BF16 = torch.bfloat16


def test_roundings_leave_no_bias():
    """Probabilities and ds that are cut off, not rounded, are 0.3 % short: less than a result's own rounding error."""
    layout = PackedLayout.from_counts([[70, 59]])
    case = Case(layout, AttentionMask(causal=True), heads=4, kv_heads=2, width=64, dtype=BF16)
    leaf, wide = case.leaves[0].clone().requires_grad_(), case.leaves[0].double().requires_grad_()
    do = case.gradients[0]
    out = attention(*case.arguments([leaf])[:3], layout=layout, mask=case.mask, impl="cpp")
    exact = dense_oracle(case, *case.arguments([wide]))[0]
    ours = out, *case.arguments(torch.autograd.grad(out, [leaf], do))[:3]
    refs = exact, *case.arguments(torch.autograd.grad(exact, [wide], do.double()))[:3]
    for name, got, ref in zip(("out", "dq", "dk", "dv"), ours, refs, strict=True):
        share = float(((got.double() * ref).sum() / ref.square().sum()).detach())
        assert abs(share - 1) < 1e-3, f"{name}: {share:.5f} of the exact result"


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_gradients_through_both_ends_of_a_block(dtype):
    """Text on both sides of an image that it does not see, within one block of backward's: two stretches of panels."""
    layout = PackedLayout.from_segments([[(0, 40), (1, 64), (0, 23)]], num_modalities=2)
    with poisoned_empty():
        check(layout, AttentionMask.isolated(2), impl="cpp", dtype=dtype, heads=4, kv_heads=2, width=24)

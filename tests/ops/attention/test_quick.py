"""Calls that are recognised from an earlier one: the same numbers, the same errors, and seen by who looks on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmkernels.ops.attention import op, quick
from mmkernels.ops.attention.api import attention

pytestmark = pytest.mark.skipif(dispatch.cpp_missing() is not None, reason="the extension is not built")
MASKS = [None, AttentionMask(causal=True), AttentionMask.isolated(2)]


def inputs(dtype=torch.float32, learns=True):
    layout = PackedLayout.from_segments([[(0, 5), (1, 9)], [], [(1, 1)], [(0, 40)]], num_modalities=2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(55, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
    return layout, [x.requires_grad_(learns) for x in (q, k, v)]


def long_way(monkeypatch):
    monkeypatch.setattr(quick, "attend", lambda *call: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("learns", [False, True])
def test_equal_to_the_long_way(dtype, mask, learns, monkeypatch):
    layout, leaves = inputs(dtype, learns)
    with pytest.MonkeyPatch.context() as patch:
        long_way(patch)
        expected = attention(*leaves, layout=layout, mask=mask)
    monkeypatch.setattr(op, "attention_fwd", None)  # from here on the call must be recognised
    found = attention(*leaves, layout=layout, mask=mask)
    assert torch.equal(found, expected)
    assert found.requires_grad == learns
    if learns:
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for ours, theirs in zip(*(torch.autograd.grad(x, leaves, grad) for x in (found, expected)), strict=True):
            assert torch.equal(ours, theirs)


def test_a_call_is_recognised_by_all_that_decides_it(monkeypatch):
    layout, leaves = inputs()
    attention(*leaves, layout=layout)
    wide = [x.detach().repeat(1, 1, 2) for x in leaves]
    calls = [
        lambda: attention(*leaves, layout=layout, mask=MASKS[1]),
        lambda: attention(*leaves, layout=layout, scale=0.5),
        lambda: attention(*leaves, layout=layout, impl="torch"),
        lambda: attention(*(x.to(torch.float16) for x in leaves), layout=layout),
        lambda: attention(*wide, layout=layout),
    ]
    found = [[call() for _ in range(2)] for call in calls]
    long_way(monkeypatch)
    for (first, second), call in zip(found, calls, strict=True):
        expected = call()
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


def test_errors_are_those_of_a_first_call():
    layout, (q, k, v) = inputs(learns=False)
    for _ in range(2):
        attention(q, k, v, layout=layout)
        with pytest.raises(ValueError, match="k has 54 tokens, expected the layout's 55"):
            attention(q, k[1:], v, layout=layout)
        with pytest.raises(ValueError, match=r"v is torch.float16, expected q's torch.float32"):
            attention(q, k, v.half(), layout=layout)
        with pytest.raises(ValueError, match="k has 3 heads, expected a divisor of q's 4"):
            attention(q, k[:, [0, 1, 1]], v[:, [0, 1, 1]], layout=layout)
        with pytest.raises(ValueError, match="mask is list, expected AttentionMask"):
            attention(q, k, v, layout=layout, mask=[1])
        with pytest.raises(ValueError, match="v is NoneType, expected a tensor"):
            attention(q, k, None, layout=layout)


def test_any_strides():
    layout, (q, k, v) = inputs()
    expected = attention(q, k, v, layout=layout)
    columns = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    found = attention(*columns, layout=layout)
    assert torch.equal(found, expected)
    grad = torch.randn(16, 4, 55).permute(2, 1, 0)  # strided in its last dimension
    for ours, theirs in zip(
        torch.autograd.grad(attention(q, k, v, layout=layout), (q, k, v), grad),
        torch.autograd.grad(found, columns, grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_who_looks_on_sees_the_operators():
    layout, leaves = inputs()
    flops = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            attention(*leaves, layout=layout).sum().backward()
        flops.append(counter.get_total_flops())
    out = attention(*leaves, layout=layout)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert flops[0] == flops[1] > 0
    assert counter.get_total_flops() == flops[0] * 10 // 14


def test_no_second_order():
    layout, leaves = inputs()
    for _ in range(2):
        out = attention(*leaves, layout=layout)
        (first, *_) = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="only first-order"):
            first.sum().backward()


def test_a_scale_that_is_a_tensor_is_read_each_time():
    layout, leaves = inputs(learns=False)
    scale = torch.tensor(0.1)
    first = [attention(*leaves, layout=layout, scale=scale) for _ in range(2)]
    scale.fill_(1.0)
    assert torch.equal(attention(*leaves, layout=layout, scale=scale), attention(*leaves, layout=layout, scale=1.0))
    assert torch.equal(first[0], first[1])


def test_a_layout_keeps_a_limited_number_of_calls():
    layout, leaves = inputs(learns=False)
    for step in range(2 * quick.MOST_CALLS):
        attention(*leaves, layout=layout, scale=0.1 + step)
    assert len(layout.calls) <= quick.MOST_CALLS

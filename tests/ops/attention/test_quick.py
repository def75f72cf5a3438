"""Calls that are recognised from an earlier one: the same numbers, the same errors, and seen by who looks on."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmkernels.ops.attention import op, quick
from mmkernels.ops.attention.api import attention, attention_qkvpacked

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_one_projection_has_one_gradient_and_the_same_numbers(dtype, mask, monkeypatch):
    layout, (q, _, _) = inputs(dtype, learns=False)
    generator = torch.Generator().manual_seed(2)
    qkv, grad = (torch.randn(*shape, *q.shape[1:], generator=generator).to(dtype) for shape in ((55, 3), (55,)))
    leaves = [x.detach().requires_grad_() for x in qkv.unbind(1)]
    expected = attention(*leaves, layout=layout, mask=mask)
    wanted = torch.stack(torch.autograd.grad(expected, leaves, grad), 1)
    qkv.requires_grad_()
    for recognised in (False, True):
        if recognised:
            monkeypatch.setattr(op, "attention_fwd", None)
            monkeypatch.setattr(torch, "stack", None)
        else:
            layout.calls.clear()
        out = attention_qkvpacked(qkv, layout=layout, mask=mask)
        (found,) = torch.autograd.grad(out, [qkv], grad)
        assert torch.equal(out, expected)
        assert torch.equal(found, wanted)
        assert found.is_contiguous()


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_meets_a_new_layout(packed):
    """Forward goes the long way and its repetition the short one: they must keep the same tensors."""
    layout, (q, _, _) = inputs(learns=False)
    qkv = q.unsqueeze(1).repeat(1, 3, 1, 1).requires_grad_()

    def attend(qkv):
        if packed:
            return attention_qkvpacked(qkv, layout=layout)
        return attention(*qkv.unbind(1), layout=layout)

    (found,) = torch.autograd.grad(checkpoint(attend, qkv, use_reentrant=False).sum(), [qkv])
    (expected,) = torch.autograd.grad(attend(qkv).sum(), [qkv])
    assert torch.equal(found, expected)


def test_one_projection_without_gradients_and_errors():
    layout, (q, _, _) = inputs(learns=False)
    qkv = q.unsqueeze(1).repeat(1, 3, 1, 1)
    for _ in range(2):
        assert torch.equal(attention_qkvpacked(qkv, layout=layout), attention(q, q, q, layout=layout))
        for wrong in (qkv[:, :2], qkv.flatten(1), [q, q, q]):
            with pytest.raises(ValueError, match=r"qkv is .*, expected a tensor \[T, 3, heads, head width\]"):
                attention_qkvpacked(wrong, layout=layout)
        with pytest.raises(ValueError, match="q has 54 tokens, expected the layout's 55"):
            attention_qkvpacked(qkv[1:].requires_grad_(), layout=layout)


def test_one_projection_has_no_second_order_and_is_seen_by_who_looks_on():
    layout, (q, _, _) = inputs(learns=False)
    qkv = q.unsqueeze(1).repeat(1, 3, 1, 1).requires_grad_()
    for _ in range(2):
        (first,) = torch.autograd.grad(attention_qkvpacked(qkv, layout=layout).sum(), [qkv], create_graph=True)
        with pytest.raises(NotImplementedError, match="only first-order"):
            first.sum().backward()
    with FlopCounterMode(display=False) as counter:
        attention_qkvpacked(qkv, layout=layout).sum().backward()
    flops = counter.get_total_flops()
    out = attention_qkvpacked(qkv, layout=layout)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == flops * 10 // 14 > 0


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


def test_what_is_refused_does_not_depend_on_what_was_met():
    layout, leaves = inputs(learns=False)
    for _ in range(2):
        attention(*leaves, layout=layout)
        with pytest.raises(ValueError, match="dropout_p is None"):
            attention(*leaves, layout=layout, dropout_p=None)
        with pytest.raises(ValueError, match="scale is a tensor"):
            attention(*leaves, layout=layout, scale=torch.tensor(0.1))


def test_a_layout_keeps_a_limited_number_of_calls():
    layout, leaves = inputs(learns=False)
    for step in range(2 * quick.MOST_CALLS):
        attention(*leaves, layout=layout, scale=0.1 + step)
    assert len(layout.calls) <= quick.MOST_CALLS

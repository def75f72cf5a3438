"""torch.func over every operator: gradients are autograd's, vmap loops, and forward mode is refused, never zero."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from mmkernels import (
    PackedLayout,
    attention,
    dispatch,
    gather_rows,
    modality_embed,
    pack,
    pad,
    segment_mean,
    unpack,
    unpad,
)
from mmkernels.compat import flash_attn
from mmkernels.compat.torch_sdpa import scaled_dot_product_attention as sdpa
from mmkernels.modules import MultiheadAttention

LAYOUT = PackedLayout.from_counts([[3, 2], [1, 4], [0, 0], [2, 0]])
T, E = LAYOUT.total_tokens, 8
FIRST, SECOND = LAYOUT.stream_lengths
IMPLS = ("reference", "torch", *(["cpp"] if dispatch.cpp_missing() is None else []))


def drawn(*shape):
    """Numbers that look random; vmap lets nobody draw."""
    return (torch.arange(math.prod(shape)) * 12.9898 + sum(shape)).sin().reshape(shape)


def embed(impl, streams=None, weight=None, table=None):
    streams = [drawn(FIRST, E), torch.arange(SECOND)] if streams is None else streams
    return modality_embed(
        streams, LAYOUT, modality_weight=drawn(2, E) if weight is None else weight, token_weight=drawn(30, E),
        position_weights=[drawn(9, E) if table is None else table, None], norm_weight=drawn(E), impl=impl,
    )  # fmt: skip


# What each makes of one tensor, and that tensor's shape.
OPERATORS = {
    "pack": (lambda x, impl: pack([x, drawn(SECOND, E)], LAYOUT, impl=impl), (FIRST, E)),
    "unpack": (lambda x, impl: unpack(x, LAYOUT, impl=impl), (T, E)),
    "pad": (lambda x, impl: pad(x, LAYOUT, impl=impl)[0], (T, E)),
    "unpad": (lambda x, impl: unpad(x, LAYOUT, impl=impl), (4, LAYOUT.max_seqlen + 1, E)),
    "gather_rows": (lambda x, impl: gather_rows(x, torch.tensor([0, 3, 3]), impl=impl), (T, E)),
    "segment_mean": (lambda x, impl: segment_mean(x, LAYOUT, impl=impl), (T, E)),
    "modality_embed of a stream": (lambda x, impl: embed(impl, [x, drawn(SECOND, E)]), (FIRST, E)),
    "modality_embed of its weight": (lambda x, impl: embed(impl, weight=x), (2, E)),
    "modality_embed of a table": (lambda x, impl: embed(impl, table=x), (9, E)),
    "attention": (lambda x, impl: attention(x, x.sin(), x.cos(), layout=LAYOUT, impl=impl), (T, 2, E)),
}
LINEAR = ("pack", "unpack", "pad", "unpad", "gather_rows", "segment_mean")


def scalar(name, impl):
    def function(x):
        out = OPERATORS[name][0](x, impl)
        return sum((part * drawn(*part.shape)).square().sum() for part in (out if isinstance(out, list) else [out]))

    return function


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients(name, impl):
    function, xs = scalar(name, impl), drawn(2, *OPERATORS[name][1])
    leaves = xs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(function(x) for x in leaves), leaves)
    found = torch.stack([torch.func.grad(function)(x) for x in xs])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(function))(xs), expected)
    # vmap alone, and autograd through it: a wrapper does not say that what it wraps requires a gradient
    (through,) = torch.autograd.grad(torch.vmap(function)(leaves).sum(), leaves)
    torch.testing.assert_close(through, expected)
    torch.testing.assert_close(torch.func.jacrev(function)(xs[0]), expected[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_gradients(name):
    function, x = scalar(name, "auto"), drawn(*OPERATORS[name][1])
    if name in LINEAR:
        expected = torch.autograd.functional.hessian(function, x)
        torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(function))(x), expected)
    else:
        with pytest.raises(NotImplementedError, match="only first-order gradients exist"):
            torch.func.jacrev(torch.func.jacrev(function))(x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_is_refused(name, impl):
    function, x = scalar(name, impl), drawn(*OPERATORS[name][1])
    message = f"{name.split()[0]}: there is no forward mode"
    function(x)  # met before, calls may take a shorter way
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():
        function(x)  # without a tangent


@pytest.mark.parametrize("name", ["gather_rows", "segment_mean"])
def test_forward_mode_is_refused_with_out_too(name):
    packed, rows = drawn(T, E), torch.tensor([0, 3])
    call, where = (gather_rows, rows) if name == "gather_rows" else (segment_mean, LAYOUT)
    out = torch.empty_like(call(packed, where))
    with forward_ad.dual_level():
        call(packed, where, out=out)
        with pytest.raises(NotImplementedError, match=f"{name}: there is no forward mode"):
            call(forward_ad.make_dual(packed, packed), where, out=out)


def test_a_layout_may_be_made_inside():
    def function(x):
        return attention(x, x, x, layout=PackedLayout.from_counts([[3], [1]])).sum()

    x = drawn(4, 2, E)
    torch.testing.assert_close(torch.func.grad(function)(x), torch.autograd.grad(function(x.requires_grad_()), x)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPERATORS)
def test_many_gradients_at_once(name, impl):
    """torch.autograd.grad(is_grads_batched=True): right, or refused where lists of tensors go through."""
    function, shape = OPERATORS[name]
    lists = name in ("pack", "unpack") or name.startswith("modality_embed")
    for _ in range(2):  # attention's second call goes a shorter way
        x = drawn(*shape).requires_grad_()
        out = function(x, impl)
        out = out[0] if isinstance(out, list) else out
        grads = drawn(3, *out.shape)
        if lists:
            with pytest.raises(
                NotImplementedError, match=f"^{name.split()[0]}: gradients come one at a time, not batched"
            ):
                torch.autograd.grad(out, x, grads, is_grads_batched=True)
            continue
        (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in grads]
        torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("impl", ["auto", "cpp", "torch", "reference"])
def test_vmap_over_ids(impl):
    """What is asked of their range is asked of all of them."""
    ids, layout, table = torch.tensor([[0, 3], [2, 2], [4, 1]]), PackedLayout.from_counts([[2]]), drawn(5, E)

    def call(ids, table):
        return modality_embed([ids], layout, modality_weight=drawn(1, E), token_weight=table, impl=impl)

    expected = torch.stack([call(one, table) for one in ids])
    torch.testing.assert_close(torch.vmap(call, (0, None))(ids, table), expected)
    each = torch.vmap(torch.func.grad(lambda table, ids: call(ids, table).square().sum()), (None, 0))(table, ids)
    leaf = table.clone().requires_grad_()
    wanted = [torch.autograd.grad(call(one, leaf).square().sum(), leaf)[0] for one in ids]
    torch.testing.assert_close(each, torch.stack(wanted))
    with pytest.raises(IndexError, match="ids from 0 to 5, token_weight has 5 rows"):
        torch.vmap(call, (0, None))(ids + (ids == 4), table)
    rows = torch.vmap(gather_rows, (None, 0))(table, ids)
    assert torch.equal(rows, table[ids])


def test_vmap_over_nothing_is_refused():
    with pytest.raises(NotImplementedError, match="gather_rows: vmap over a dimension of size 0"):
        torch.vmap(scalar("gather_rows", "auto"))(drawn(0, T, E))


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MODULE = MultiheadAttention(16, 2, batch_first=True)
# Masks, lengths and bounds made outside, and inside, where torch.func wraps what is made.
DROP_INS = {
    "mask": lambda x: sdpa(x, x, x, attn_mask=SEEN),
    "mask made inside": lambda x: sdpa(x, x, x, attn_mask=~PADDING[:, None, None]),
    "lengths": lambda x: sdpa(x, x, x, lengths=torch.tensor([5, 3]) + 0),
    "lengths on the host": lambda x: sdpa(x, x, x, lengths=[4, 1], window=(2, 0)),
    "flash_attn": lambda x: flash_attn.flash_attn_func(x, x, x, causal=True, window_size=(1, 0)),
    "bounds": lambda x: flash_attn.flash_attn_varlen_func(*[x.flatten(0, 1)] * 3, BOUNDS, BOUNDS.clone(), 6, 6),
    "module": lambda x: MODULE(*[x.flatten(2)] * 3, key_padding_mask=PADDING, need_weights=False)[0],
}
SEEN, BOUNDS = ~PADDING[:, None, None], torch.tensor([0, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize("name", DROP_INS)
def test_drop_ins_under_transforms(name):
    """First by torch.func, so that what is kept is made there; then as everybody calls them."""

    def function(x):
        return DROP_INS[name](x).square().sum()

    xs = torch.stack([drawn(2, 5, 2, 8), drawn(2, 5, 2, 8) + 1])
    if name not in ("flash_attn", "bounds", "module"):
        xs = xs.transpose(2, 3)
    found = torch.stack([torch.func.grad(function)(x) for x in xs])
    vmapped = torch.vmap(torch.func.grad(function))(xs)
    leaves = xs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(map(function, leaves)), leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(vmapped, expected)


def test_what_is_read_is_not_mapped_over():
    x = drawn(2, 5, 2, 8).transpose(1, 2)
    with pytest.raises(NotImplementedError, match="vmap goes over a mask, lengths or bounds"):
        torch.vmap(lambda mask: sdpa(x, x, x, attn_mask=mask))(torch.stack([SEEN, SEEN]))

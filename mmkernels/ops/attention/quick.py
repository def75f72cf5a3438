"""The shortest way through attention: shapes and a mask that were met before, `out` alone, by C++ or Triton.

On a CPU a call of a layer takes a millisecond or two, and other layers have emptied the caches before it: every Python
function and every operator on the way then costs 10 us and more.  On a GPU the kernels of a small batch take less time
than finding out how to launch them.  So what the long way (api.py) found out is kept on the layout, and asked for by
one key.  The C++ checks its tensors itself, and where it refuses, the long way says what is wrong; for Triton the key
holds all that was checked, strides, devices and alignment of q, k and v included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import dispatch, tracing, transforms
from mmkernels.layout import PackedLayout
from mmkernels.ops.attention import op
from mmkernels.ops.attention.inputs import Lowered, uses_tf32

SCALES = (float, int, type(None))  # a tensor, say, may change its value and stay the same key
MOST_CALLS = 64  # that a layout keeps: a model's layers ask for one or two


class ByCpp:
    """One answer of the long way.   rest: what torch.ops.mm.attention_fwd takes after rng, for cpp"""

    __slots__ = ("arguments", "cpp", "lse_like", "rest")

    def __init__(self, q: Tensor, rest: tuple) -> None:
        *lowered, _, _ = rest
        self.rest, self.lse_like = rest, _lse_like(q)
        self.cpp = dispatch.load("attention", "cpp")
        self.arguments = self.cpp.arguments(Lowered(*lowered))

    def forward(self, q, k, v, out, lse: Tensor | None) -> None:
        self.cpp.run_forward(q, k, v, None, None, *self.arguments[0], out, lse, None)

    def backward(self, do, q, k, v, out, lse, dq, dk, dv) -> None:
        self.cpp.run_backward(do, None, q, k, v, None, None, out, lse, *self.arguments[1], dq, dk, dv, None)


class ByTriton:
    """The same for Triton, with the launches that were made: forward's, and backward's by traits of what it reads."""

    __slots__ = ("backward_launches", "forward_launches", "lowered", "lse_like", "rest", "triton")

    def __init__(self, q: Tensor, rest: tuple) -> None:
        *lowered, _, _ = rest
        self.rest, self.lse_like = rest, _lse_like(q)
        self.lowered = Lowered(*lowered)
        self.triton = dispatch.load("attention", "triton")
        self.forward_launches, self.backward_launches = {}, {}

    def launches(self) -> list[dict]:
        """What was launched and is kept, by kernel."""
        return [kept for kept in (self.forward_launches, *self.backward_launches.values()) if kept]

    def forward(self, q, k, v, out, lse: Tensor | None) -> None:
        if lse is None:  # the kernel writes it all the same
            lse = torch.empty_like(self.lse_like, memory_format=torch.contiguous_format)
        self.triton.attention_fwd(q, k, v, None, None, out, lse, None, self.lowered, self.forward_launches)

    def backward(self, do, q, k, v, out, lse, dq, dk, dv) -> None:
        # do comes as it likes, hooks may have moved what was saved, and gradients are apart or parts of one tensor.
        key = _traits(do, q, k, v, out, lse, dq, dk, dv), uses_tf32(q)
        launches = self.backward_launches.setdefault(key, {})
        self.triton.attention_bwd(do, None, q, k, v, None, None, out, lse, dq, dk, dv, None, self.lowered, launches)


def _computed(ctx, q, k, v, known) -> Tensor:
    lse = torch.empty_like(known.lse_like, memory_format=torch.contiguous_format)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    known.forward(q, k, v, out, lse)
    ctx.save_for_backward(q, k, v, out, lse)  # as the long way does: checkpointing counts them
    ctx.known = known
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, known):
        return _computed(ctx, q, k, v, known)

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled() or transforms.is_batched(do) or not tracing.unwatched(do):
            return *op.gradients(do, None, q, k, v, None, None, out, lse, ctx.known.rest)[:3], None
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        ctx.known.backward(do, q, k, v, out, lse, dq, dk, dv)
        return dq, dk, dv, None


class _PackedAttention(torch.autograd.Function):
    """The same for the views of one projection, whose gradient is then written into one tensor, not joined later."""

    @staticmethod
    def forward(ctx, qkv, known):
        return _computed(ctx, *qkv.unbind(1), known)

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled() or transforms.is_batched(do) or not tracing.unwatched(do):
            return torch.stack(op.gradients(do, None, q, k, v, None, None, out, lse, ctx.known.rest)[:3], 1), None
        gradient = q.new_empty((q.shape[0], 3, *q.shape[1:]))
        ctx.known.backward(do, q, k, v, out, lse, *gradient.unbind(1))
        return gradient, None


def attend_packed(qkv, layout, mask, scale, deterministic, impl) -> Tensor | None:
    """attend(*qkv.unbind(1), ...) with one gradient; None where it takes the long way, or nothing learns."""
    if torch.compiler.is_compiling() or type(layout) is not PackedLayout or type(scale) not in SCALES:
        return None
    if not tracing.unwatched(qkv) or not (torch.is_grad_enabled() and qkv.requires_grad):
        return None
    try:
        known = layout.calls.get(_key(*qkv.detach().unbind(1), mask, scale, deterministic, impl, True))
        return None if known is None else _PackedAttention.apply(qkv, known)
    except (RuntimeError, TypeError, ValueError):  # as below; ValueError: not three to unpack
        return None


def attend(q, k, v, layout, mask, scale, deterministic, impl) -> Tensor | None:
    """attention(q, k, v, layout=layout, ...), or None where it takes the long way."""
    if torch.compiler.is_compiling() or type(layout) is not PackedLayout or type(scale) not in SCALES:
        return None
    if not tracing.unwatched(q, k, v):
        return None
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    try:
        known = layout.calls.get(_key(q, k, v, mask, scale, deterministic, impl, learns))
        if known is None:
            return None
        if learns:
            return _Attention.apply(q, k, v, known)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        known.forward(q, k, v, out, None)
        return out
    except (RuntimeError, TypeError):  # what does not fit, and heads that are not contiguous: nothing is written yet
        return None


def remember(q, k, v, layout, mask, scale, deterministic, impl, learns: bool, rest: tuple) -> None:
    """Keep what the long way found out.   scale, deterministic and impl as the caller gave them"""
    by = _BY.get(rest[-1])
    if by is None or type(scale) not in SCALES or not tracing.unwatched(q, k, v):
        return
    if by is ByTriton and not dispatch.load("attention", "triton").can_replay():
        return
    key = _key(q, k, v, mask, scale, deterministic, impl, learns)
    if key not in layout.calls:
        if len(layout.calls) >= MOST_CALLS:  # a scale that changes in every step must not fill the memory
            layout.calls.clear()
        layout.calls[key] = by(q, rest)


_BY = {"cpp": ByCpp, "triton": ByTriton}


def _key(q, k, v, mask, scale, deterministic, impl, learns) -> tuple:
    if not q.is_cuda and impl != "triton":
        return "attention", mask, scale, impl, q.dtype, q.shape, learns
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return "attention", mask, scale, impl, _traits(q, k, v), learns, deterministic, uses_tf32(q)


def _traits(*tensors: Tensor) -> tuple:
    """All that checks and launches ask of tensors; a Triton kernel is compiled for pointers to 16 bytes, or for any."""
    return tuple((t.dtype, t.shape, t.stride(), t.get_device(), t.data_ptr() % 16 == 0) for t in tensors)


def _lse_like(q: Tensor) -> Tensor:
    """One number that looks like [H, Tq]: empty_like of it makes lse, by the code that has just made `out`."""
    return torch.empty((), dtype=torch.float32, device=q.device).expand(q.shape[1], q.shape[0])

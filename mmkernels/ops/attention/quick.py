"""The shortest way through attention on a CPU: shapes and a mask that were met before, `out` alone, by C++.

A call of a layer takes a millisecond or two, and other layers have emptied the caches before it: every Python function
and every operator on the way then costs 10 us and more.  So what the long way (api.py) found out is kept on the layout,
and asked for by one key; the C++ checks its tensors itself, and where it refuses, the long way says what is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.attention import op
from mmkernels.ops.attention.inputs import Lowered


class Known:
    """One answer of the long way.   rest: what torch.ops.mm.attention_fwd takes after rng, for cpp"""

    __slots__ = ("backward", "cpp", "forward", "lse_like", "rest")

    def __init__(self, q: Tensor, rest: tuple) -> None:
        *lowered, _, _ = rest
        self.rest = rest
        self.cpp = dispatch.load("attention", "cpp")
        self.forward, self.backward = self.cpp.arguments(Lowered(*lowered))
        # One number that looks like [H, Tq]: who has just made `out` by empty_like makes lse by it in no time.
        self.lse_like = torch.empty((), dtype=torch.float32).expand(q.shape[1], q.shape[0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        self.cpp.run_forward(q, k, v, None, None, *self.forward, out, lse, None)
        return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, known):
        lse = torch.empty_like(known.lse_like, memory_format=torch.contiguous_format)
        out = known.attend(q, k, v, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.known = known
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled() or not dispatch.unwatched(do):
            return *op.gradients(do, None, q, k, v, None, None, out, lse, ctx.known.rest)[:3], None
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        do = do if do.stride(2) == 1 else do.contiguous()
        ctx.known.cpp.run_backward(do, None, q, k, v, None, None, out, lse, *ctx.known.backward, dq, dk, dv, None)
        return dq, dk, dv, None


def attend(q, k, v, layout, mask, scale, impl) -> Tensor | None:
    """attention(q, k, v, layout=layout, mask=mask, scale=scale, impl=impl), or None where it takes the long way."""
    if torch.compiler.is_compiling() or type(layout) is not PackedLayout or not dispatch.unwatched(q, k, v):
        return None
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    try:
        known = layout.calls.get(_key(q, mask, scale, impl, learns))
        if known is None:
            return None
        return _Attention.apply(q, k, v, known) if learns else known.attend(q, k, v, None)
    except (RuntimeError, TypeError):  # what does not fit, and heads that are not contiguous: nothing is written yet
        return None


def remember(q, layout, mask, scale, impl, learns: bool, rest: tuple) -> None:
    """Keep what the long way found out.   scale and impl as the caller gave them"""
    key = _key(q, mask, scale, impl, learns)
    if key not in layout.calls:
        layout.calls[key] = Known(q, rest)


def _key(q, mask, scale, impl, learns) -> tuple:
    return "attention", mask, scale, impl, q.dtype, q.shape, learns

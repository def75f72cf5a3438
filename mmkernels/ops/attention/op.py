"""Contract of attention: schemas, fakes, autograd, FLOPs.   T tokens, H heads, G key/value heads, D head width.

The mask arrives lowered: `table` int32 [6, T] holds kv_lo, kv_hi, q_lo, q_hi, q_bits, k_bits of the MaskPlan, and the
six schedule tensors with `config` hold what the implementation's own `schedule` made of it: tiles, spans and block
shapes of the Triton kernels, or runs of the CPU path.  `impl` is a concrete name, resolved before the call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels import dispatch

_TILES = ", ".join(f"Tensor {kernel}_tiles, Tensor {kernel}_spans" for kernel in ("fwd", "dq", "dkdv"))
_TAIL = f"Tensor table, {_TILES}, int[] config, float scale, bool has_visible, str impl"

torch.library.define("mm::attention_fwd", f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "mm::attention_bwd",
    f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TAIL})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.register_fake("mm::attention_fwd")
def _fwd_fake(q, k, v, *plan):
    return _outputs(q)


@torch.library.register_fake("mm::attention_bwd")
def _bwd_fake(do, dlse, q, k, v, *plan):
    return _gradients(q, k, v)


@torch.library.impl("mm::attention_fwd", ("cpu", "cuda"))
def _fwd(q, k, v, *plan):
    *rest, impl = plan
    out, lse = _outputs(q)
    dispatch.load("attention", impl).attention_fwd(q, k, v, out, lse, *rest)
    return out, lse


@torch.library.impl("mm::attention_bwd", ("cpu", "cuda"))
def _bwd(do, dlse, q, k, v, out, lse, *plan):
    *rest, impl = plan
    dq, dk, dv = _gradients(q, k, v)
    dispatch.load("attention", impl).attention_bwd(do, dlse, q, k, v, out, lse, dq, dk, dv, *rest)
    return dq, dk, dv


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out [T, H, D] in q's dtype, lse [H, T]: fp32, or fp64 where the reference computes in it."""
    T, H, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(H, T, dtype=lse_dtype, device=q.device)


def _gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)


def _setup_context(ctx, inputs, output):
    q, k, v, *plan, config, scale, has_visible, impl = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.rest = (config, scale, has_visible, impl)
    ctx.set_materialize_grads(False)  # most callers never use lse: its gradient stays None


def _backward(ctx, do, dlse):
    q, k, v, out, lse, *plan = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(out)
    gradients = torch.ops.mm.attention_bwd(do, dlse, q, k, v, out, lse, *plan, *ctx.rest)
    return *gradients, *(None,) * (len(plan) + len(ctx.rest))


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError("attention: only first-order gradients are there; backward has no gradient")


torch.library.register_autograd("mm::attention_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("mm::attention_bwd", _refuse_second_order)


def visible_pairs(table: Tensor, has_visible: bool) -> int:
    """Query-key pairs that the lowered mask lets through.  A table without data (fake, meta) counts as dense."""
    T = table.shape[1]
    if table.device.type == "meta" or isinstance(table, torch._subclasses.FakeTensor):
        return T * T
    lo, hi, _, _, q_bits, k_bits = table.long().unbind(0)
    if not has_visible:
        return int((hi - lo).sum())
    pairs = 0
    for m in range(32):
        is_key = (k_bits >> m) & 1
        before = torch.cat([is_key.new_zeros(1), is_key.cumsum(0)])  # keys of modality m before each token
        pairs += int((((q_bits >> m) & 1) * (before[hi] - before[lo])).sum())
    return pairs


@register_flop_formula(torch.ops.mm.attention_fwd, get_raw=True)
def _fwd_flops(q, k, v, table, *plan, out_val=None, **kwargs) -> int:
    return 4 * visible_pairs(table, plan[-2]) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.mm.attention_bwd, get_raw=True)
def _bwd_flops(do, dlse, q, k, v, out, lse, table, *plan, out_val=None, **kwargs) -> int:
    return 10 * visible_pairs(table, plan[-2]) * q.shape[1] * q.shape[2]  # five products of the forward's two

"""The padded drop-ins inside torch.compile: one operator that plans when it runs.   B samples, H heads, T = B L tokens.

A compiled region cannot hold host code that reads lengths or masks; an operator may.  Eager calls do not come here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels import tracing
from mmkernels.compat import plans
from mmkernels.compat.padded import as_packed
from mmkernels.compat.plans import Refused, Seen, Shape
from mmkernels.masks import MaskPlan
from mmkernels.ops.attention.api import prepared
from mmkernels.ops.attention.inputs import Request

_SEEN = (
    "SymInt batch, bool is_causal, int left, int right, bool bottom_right, "
    "Tensor? lengths, Tensor? key_lengths, Tensor? mask"
)
_REST = (
    f"Tensor? rng, {_SEEN}, float scale, float dropout_p, bool needs_backward, bool deterministic, str impl, str who"
)
_ON_HOST = ("lengths", "key_lengths")  # or on the device
torch.library.define("mm::padded_attention_fwd", f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "mm::padded_attention_bwd",
    f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    *,
    scale: float | None,
    dropout_p: float,
    deterministic: bool | None,
    return_lse: bool = False,
    impl: str,
    who: str,
):
    """padded.attend for a region that is being compiled; lengths are tensors, or constants of the graph.

    who: what the user called, for errors.
    """
    batch, heads, queries, width = q.shape
    lengths, key_lengths = (
        None if n is None else n if isinstance(n, Tensor) else torch.tensor(n, device="cpu")
        for n in (seen.lengths, seen.key_lengths)
    )
    if key_lengths is None:
        key_lengths = lengths
    rng = torch.randint(2**63 - 1, (2,), device=q.device) if dropout_p > 0.0 else None
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out, lse = torch.ops.mm.padded_attention_fwd(
        *(as_packed(t, False) for t in (q, k, v)), rng, batch, seen.is_causal, *seen.window, seen.bottom_right,
        lengths, key_lengths, seen.mask, 1.0 / math.sqrt(width) if scale is None else float(scale), float(dropout_p),
        learns, torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic, impl, who,
    )  # fmt: skip
    out = out.view(batch, queries, heads, width).transpose(1, 2)
    return (out, lse.view(heads, batch, queries).transpose(0, 1)) if return_lse else out


def _lowered(q: Tensor, k: Tensor, batch, is_causal, left, right, bottom_right, lengths, key_lengths, mask, scale,
             dropout_p, needs_backward, deterministic, impl, who):  # fmt: skip
    """The arguments of mm.attention_fwd and mm.attention_bwd from q_table to dropout_p, and the implementation."""
    shape = Shape(batch, q.shape[1], k.shape[1], q.shape[0] // batch, k.shape[0] // batch)
    seen = Seen(is_causal, (left, right), bottom_right, lengths, key_lengths, mask)
    planned = plans.plan(seen, shape, q.device)
    if isinstance(planned, Refused) or planned.by_head:
        reason = planned.reason if isinstance(planned, Refused) else "attn_mask differs between heads"
        raise NotImplementedError(f"{who}: {reason} (inside torch.compile)")
    plan = MaskPlan.lower(planned.layout, planned.mask, planned.k_layout)
    request = Request(q.dtype, q.shape[2], needs_backward, deterministic, extras=dropout_p > 0.0)
    impl, schedule = prepared(plan, impl, request)
    return (plan.q_table, plan.k_table, *schedule, scale, plan.has_visible, dropout_p), impl


def _fwd(q, k, v, rng, *rest):
    lowered, impl = _lowered(q, k, *rest)
    out, lse, _ = torch.ops.mm.attention_fwd(q, k, v, None, rng, *lowered, 0, impl)
    return out, lse


def _bwd(do, dlse, q, k, v, out, lse, rng, *rest):
    lowered, impl = _lowered(q, k, *rest)
    return torch.ops.mm.attention_bwd(do, dlse, q, k, v, None, rng, out, lse, *lowered, impl)[:3]


torch.library.impl("mm::padded_attention_fwd", ("cpu", "cuda"), _fwd)
torch.library.impl("mm::padded_attention_bwd", ("cpu", "cuda"), _bwd)


@torch.library.register_fake("mm::padded_attention_fwd")
def _fwd_fake(q, *rest):
    tracing.refuse_meta_beside_real(torch.ops.mm.padded_attention_fwd.default, (q, *rest), on_host=_ON_HOST)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("mm::padded_attention_bwd")
def _bwd_fake(do, dlse, q, k, v, *rest):
    given = (do, dlse, q, k, v, *rest)
    tracing.refuse_meta_beside_real(torch.ops.mm.padded_attention_bwd.default, given, on_host=_ON_HOST)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, rng, batch, is_causal, left, right, bottom_right, lengths, key_lengths, mask, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, rng, lengths, key_lengths, mask)
    ctx.numbers = batch, is_causal, left, right, bottom_right
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    q, k, v, out, lse, rng, lengths, key_lengths, mask = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(out)
    gradients = torch.ops.mm.padded_attention_bwd(
        do, dlse, q, k, v, out, lse, rng, *ctx.numbers, lengths, key_lengths, mask, *ctx.rest
    )
    return *gradients, *(None,) * 15


torch.library.register_autograd("mm::padded_attention_fwd", _backward, setup_context=_setup_context)

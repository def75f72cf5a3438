"""Contract of attention: schemas, fakes, autograd, FLOPs.   Tq, Tk tokens, H heads, G key/value heads, D head width.

The mask arrives lowered, as inputs.Lowered says.  pair_bias is fp32 [H, Mq, Mk] (fp64 for the reference).  rng int64
[2] is (seed, offset) of the dropout mask.  mass_modalities is Mk where modality mass is wanted, else 0.  `impl` is a
concrete name, resolved before the call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels import dispatch, tracing, transforms
from mmkernels.layout_tables import MAX_MODALITIES
from mmkernels.ops.attention.inputs import Lowered

_TILES = ", ".join(f"Tensor {kernel}_tiles, Tensor {kernel}_spans" for kernel in ("fwd", "dq", "dkdv"))
_LOWERED = f"Tensor q_table, Tensor k_table, {_TILES}, int[] config, float scale, bool has_visible, float dropout_p"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? pair_bias, Tensor? rng"

torch.library.define(
    "mm::attention_fwd",
    f"({_INPUTS}, {_LOWERED}, int mass_modalities, str impl) -> (Tensor out, Tensor lse, Tensor mass)",
)
torch.library.define(
    "mm::attention_bwd",
    f"(Tensor do, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, {_LOWERED}, str impl)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
)


@torch.library.register_fake("mm::attention_fwd")
def _fwd_fake(q, *rest):
    tracing.refuse_meta_beside_real(_fwd_op, (q, *rest))
    return _outputs(q, rest[-2])


@torch.library.register_fake("mm::attention_bwd")
def _bwd_fake(do, dlse, q, k, v, pair_bias, *rest):
    tracing.refuse_meta_beside_real(_bwd_op, (do, dlse, q, k, v, pair_bias, *rest))
    return _gradients(q, k, v, pair_bias)


def _fwd(q, k, v, pair_bias, rng, *rest):
    *lowered, mass_modalities, impl = rest
    given, planned = (len(q), len(k)), (lowered[0].shape[1], lowered[1].shape[1])
    if given != planned:  # a trace on tensors of other sizes: who calls it does not go by the checks of `attention`
        raise ValueError(f"attention: q and k have {given} tokens, expected {planned} as in the layout that was traced")
    out, lse, mass = _outputs(q, mass_modalities)
    dispatch.load("attention", impl).attention_fwd(
        q, k, v, pair_bias, rng, out, lse, mass if mass_modalities else None, Lowered(*lowered)
    )
    return out, lse, mass


def _bwd(do, dlse, q, k, v, pair_bias, rng, out, lse, *rest):
    *lowered, impl = rest
    dq, dk, dv, dbias = _gradients(q, k, v, pair_bias)
    dispatch.load("attention", impl).attention_bwd(
        do, dlse, q, k, v, pair_bias, rng, out, lse, dq, dk, dv, None if pair_bias is None else dbias, Lowered(*lowered)
    )
    return dq, dk, dv, dbias


torch.library.impl("mm::attention_fwd", ("cpu", "cuda"), _fwd)
torch.library.impl("mm::attention_bwd", ("cpu", "cuda"), _bwd)


def _outputs(q: Tensor, mass_modalities: int) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, D] in q's dtype, lse [H, Tq] and mass [Tq, H, Mk] in fp32 (of fp64 q: fp64)."""
    T, H, _ = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((H, T), dtype=exact), q.new_empty((T, H, mass_modalities), dtype=exact)


def _gradients(q: Tensor, k: Tensor, v: Tensor, pair_bias: Tensor | None) -> tuple[Tensor, ...]:
    dbias = q.new_empty(0) if pair_bias is None else torch.empty_like(pair_bias)
    return *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)), dbias


class _Attention(torch.autograd.Function):
    """What `attention_fwd` differentiates by: it costs a quarter of torch.library's own wrapping.

    The plan's tensors come as one tuple: autograd would look at each of them, in forward and in backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, pair_bias, rng, rest):
        inputs = (q, k, v, pair_bias, rng, *rest)
        output = tracing.below_autograd(_fwd, _fwd_op, inputs, q, k, v)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return *_gradients_of(ctx, *gradients), None, None


def attention_fwd(q, k, v, pair_bias, rng, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.mm.attention_fwd for eager callers: the same operator and gradients for less host time per call.

    `python -m benchmarks attention --host` shows by how much.  Not for torch.compile, which traces the operator itself
    and knows its autograd from the registration below.
    """
    if transforms.active():
        return _transformed_fwd(q, k, v, pair_bias, rng, *rest)
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace knows no autograd.Function
        return _fwd_op(q, k, v, pair_bias, rng, *rest)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (pair_bias is not None and pair_bias.requires_grad)
    ):
        return _Attention.apply(q, k, v, pair_bias, rng, rest)
    return tracing.below_autograd(_fwd, _fwd_op, (q, k, v, pair_bias, rng, *rest), q, k, v)


def _setup_context(ctx, inputs, output):
    q, k, v, pair_bias, rng, *rest = inputs
    out, lse, mass = output
    ctx.save_for_backward(q, k, v, pair_bias, rng, out, lse)
    ctx.rest = rest  # the plan's tables with it: the same for all layers, so hooks that move saved tensors skip them
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)  # most callers never use lse: its gradient stays None


def _backward(ctx, *gradients):
    return *_gradients_of(ctx, *gradients), None, *(None,) * len(ctx.rest)


def _gradients_of(ctx, do, dlse, _):
    return gradients(do, dlse, *ctx.saved_tensors, ctx.rest)


def gradients(do, dlse, q, k, v, pair_bias, rng, out, lse, rest: tuple) -> tuple[Tensor | None, ...]:
    """Of q, k, v and pair_bias.   rest: what the forward took after rng"""
    *lowered, _, impl = rest
    if do is None:
        do = torch.zeros_like(out)
    inputs = (do, dlse, q, k, v, pair_bias, rng, out, lse, *lowered, impl)
    if transforms.active():
        dq, dk, dv, dbias = _transformed_bwd(*inputs)
    elif torch.is_grad_enabled() or any(g is not None and transforms.is_batched(g) for g in (do, dlse)):
        # A second-order gradient, of which the operator says that there is none; or many gradients at once.
        dq, dk, dv, dbias = _bwd_op(*inputs)
    else:
        dq, dk, dv, dbias = tracing.below_autograd(_bwd, _bwd_op, inputs, do, q, k, v)
    return dq, dk, dv, None if pair_bias is None else dbias


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError("attention: only first-order gradients exist, of backward there is none")


torch.library.register_autograd("mm::attention_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("mm::attention_bwd", _refuse_second_order)
_fwd_op, _bwd_op = torch.ops.mm.attention_fwd.default, torch.ops.mm.attention_bwd.default
_transformed_fwd = transforms.Rule("attention", _fwd_op, _setup_context, _backward)
_transformed_bwd = transforms.Rule(
    "attention backward", _bwd_op, lambda ctx, inputs, output: None, _refuse_second_order
)


def visible_pairs(q_table: Tensor, k_table: Tensor, has_visible: bool) -> int:
    """Query-key pairs that the lowered mask lets through.  Tables without data (fake, meta) count as dense."""
    if q_table.device.type == "meta" or isinstance(q_table, torch._subclasses.FakeTensor):
        return q_table.shape[1] * k_table.shape[1]
    lo, hi, q_bits, _ = q_table.long().unbind(0)
    if not has_visible:
        return int((hi - lo).sum())
    pairs = 0
    for m in range(MAX_MODALITIES):
        is_key = (k_table[3] == m).long()
        before = torch.cat([is_key.new_zeros(1), is_key.cumsum(0)])  # keys of modality m before each token
        pairs += int((((q_bits >> m) & 1) * (before[hi] - before[lo])).sum())
    return pairs


@register_flop_formula(torch.ops.mm.attention_fwd, get_raw=True)
def _fwd_flops(q, k, v, pair_bias, rng, q_table, k_table, *rest, out_val=None, **kwargs) -> int:
    return 4 * visible_pairs(q_table, k_table, rest[-4]) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.mm.attention_bwd, get_raw=True)
def _bwd_flops(do, dlse, q, k, v, pair_bias, rng, out, lse, q_table, k_table, *rest, out_val=None, **kwargs) -> int:
    # Five products to the forward's two.
    return 10 * visible_pairs(q_table, k_table, rest[-3]) * q.shape[1] * q.shape[2]

"""Contract of modality_embed: schemas, fakes, autograd.  Imports torch only.

T tokens, E width, M modalities, P position tables (all modalities' in one list), A position axes.
`impl` is a concrete name by the time it gets here; `needs` is a flag for each of Inputs.leaves: one per stream, then
modality_weight, token_weight, one per position table, norm_weight, norm_bias.  A gradient that is not needed comes back
empty: [0].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import dispatch, tracing, transforms
from mmkernels.ops.modality_embed.inputs import Inputs, Options

_INPUTS = (
    "Tensor[] streams, Tensor modality_weight, Tensor? token_weight, Tensor[] tables, int[] table_counts, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor modality_ids, Tensor source_rows, Tensor positions, Tensor? rng"
)
_OPTIONS = "str norm, float eps, float dropout_p"
torch.library.define(
    "mm::modality_embed_fwd",
    f"({_INPUTS}, {_OPTIONS}, ScalarType out_dtype, str impl) -> (Tensor out, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "mm::modality_embed_bwd",
    f"(Tensor grad_out, {_INPUTS}, {_OPTIONS}, Tensor mean, Tensor rstd, bool[] needs, str impl) -> "
    "(Tensor[] d_streams, Tensor d_modality, Tensor d_token, Tensor[] d_tables, "
    "Tensor d_norm_weight, Tensor d_norm_bias)",
)


def _split(args: Sequence[Any]) -> tuple[Inputs, Options, Sequence[Any]]:
    """The operator's flat arguments as the implementations take them, and the rest."""
    first, last = len(Inputs._fields), len(Inputs._fields) + len(Options._fields)
    return Inputs(*args[:first]), Options(*args[first:last]), args[last:]


def _as_inputs(leaves: Sequence[Any], table_counts: list[int], indices: Sequence[Tensor | None]) -> Inputs:
    """What Inputs.leaves took apart.   indices: modality_ids and what follows it"""
    M = len(table_counts)
    modality_weight, token_weight, *tables, norm_weight, norm_bias = leaves[M:]
    return Inputs(leaves[:M], modality_weight, token_weight, tables, table_counts, norm_weight, norm_bias, *indices)


@torch.library.register_fake("mm::modality_embed_fwd")
def _forward_fake(*args):
    tracing.refuse_meta_beside_real(_fwd_op, args)
    inputs, options, (out_dtype, _) = _split(args)
    T, like = inputs.modality_ids.shape[0], inputs.modality_weight
    stats = torch.float64 if out_dtype == torch.float64 else torch.float32
    return (
        like.new_empty((T, like.shape[1]), dtype=out_dtype),
        like.new_empty((T if options.centred else 0,), dtype=stats),
        like.new_empty((T if options.normed else 0,), dtype=stats),
    )


@torch.library.register_fake("mm::modality_embed_bwd")
def _backward_fake(grad_out, *args):
    tracing.refuse_meta_beside_real(_bwd_op, (grad_out, *args))
    inputs, _, (_, _, needs, _) = _split(args)
    grads = [
        torch.empty_like(leaf, memory_format=torch.contiguous_format) if n else grad_out.new_empty(0)
        for leaf, n in zip(inputs.leaves, needs, strict=True)
    ]
    return _as_results(grads, inputs.table_counts)


def _computed(inputs: Inputs, options: Options, out_dtype, impl):
    """out, mean and rstd by an implementation; None or empty for a statistic that the norm does not have."""
    return dispatch.load("modality_embed", impl).forward(inputs, options, out_dtype)


def _gradients(grad_out, inputs: Inputs, options: Options, mean, rstd, needs, impl):
    """In the order of `needs`, None where not needed."""
    return dispatch.load("modality_embed", impl).backward(grad_out, inputs, options, mean, rstd, needs)


def _filled(out: Tensor, *statistics: Tensor | None) -> tuple[Tensor, ...]:
    """What the operator returns: tensors only."""
    return out, *(out.new_empty(0, dtype=torch.float32) if s is None else s for s in statistics)


def _forward(*args):
    inputs, options, rest = _split(args)
    return _filled(*_computed(inputs, options, *rest))


def _backward(grad_out, *args):
    inputs, options, rest = _split(args)
    grads = _gradients(grad_out, inputs, options, *rest)
    return _as_results([grad_out.new_empty(0) if grad is None else grad for grad in grads], inputs.table_counts)


def _as_results(grads: list[Tensor], table_counts: list[int]) -> tuple:
    """As the operator returns them."""
    d = _as_inputs(grads, table_counts, [None] * 4)
    return d.streams, d.modality_weight, d.token_weight, d.tables, d.norm_weight, d.norm_bias


def _dispatched(inputs: Inputs, options: Options, *rest):
    return _fwd_op(*inputs, *options, *rest)


def _dispatched_gradients(grad_out, inputs: Inputs, options: Options, *rest) -> tuple[Tensor, ...]:
    return _one_by_one(grad_out, *inputs, *options, *rest)


def _one_by_one(*args) -> tuple[Tensor, ...]:
    """The operator's gradients, in the order of `needs`."""
    d_streams, d_modality, d_token, d_tables, d_norm_weight, d_norm_bias = _bwd_op(*args)
    return *d_streams, d_modality, d_token, *d_tables, d_norm_weight, d_norm_bias


for _device in ("cpu", "cuda"):
    torch.library.impl("mm::modality_embed_fwd", _device, _forward)
    torch.library.impl("mm::modality_embed_bwd", _device, _backward)


class _Differentiable(torch.autograd.Function):
    """call: Inputs, Options, out_dtype and impl, which compute(*call) computes.  leaves: those of the Inputs; the
    others stay inside the tuple, since autograd looks at each argument.  statistics: a list that takes mean and rstd.
    """

    @staticmethod
    def forward(ctx, call, compute, statistics, *leaves):
        inputs, options, _, ctx.impl = call
        out, mean, rstd = compute(*call)
        statistics += (mean, rstd)
        streams, ctx.shapes = inputs.streams, None
        if not options.normed:
            # Backward reads ids and shapes only: do not keep the front ends' outputs alive.
            ctx.shapes = [(s.shape, s.dtype) if s.is_floating_point() else None for s in streams]
            streams = [None if s.is_floating_point() else s for s in streams]
        ctx.options, ctx.table_counts = options, inputs.table_counts
        ctx.indices = inputs.modality_ids, inputs.source_rows, inputs.positions, inputs.rng
        ctx.save_for_backward(*streams, *leaves[len(streams) :], mean, rstd)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        transforms.refuse_batched("modality_embed", grad_out)
        *leaves, mean, rstd = ctx.saved_tensors
        if ctx.shapes is not None:
            for m, like in enumerate(ctx.shapes):
                if like is not None:  # one element that looks like a whole stream
                    leaves[m] = grad_out.new_empty_strided(like[0], (0, 0), dtype=like[1])
        needs = ctx.needs_input_grad[3:]
        call = (
            grad_out, _as_inputs(leaves, ctx.table_counts, ctx.indices), ctx.options, mean, rstd, needs, ctx.impl
        )  # fmt: skip
        if torch.is_grad_enabled():  # create_graph=True: the operator's own autograd refuses what follows
            grads = _dispatched_gradients(*call)
        else:
            grads = tracing.below_autograd(_gradients, _dispatched_gradients, call, grad_out)
        return None, None, None, *(d if n else None for d, n in zip(grads, needs, strict=True))


def _transformed_context(ctx, inputs, output):
    own, ctx.options, (_, ctx.impl) = _split(inputs)
    ctx.table_counts, (_, *statistics) = own.table_counts, output
    indices = own.modality_ids, own.source_rows, own.positions, own.rng
    ctx.save_for_backward(*own.leaves, *indices, *statistics)
    ctx.mark_non_differentiable(*statistics)


def _transformed_backward(ctx, grad_out, *_):
    *leaves, modality_ids, source_rows, positions, rng, mean, rstd = ctx.saved_tensors
    own = _as_inputs(leaves, ctx.table_counts, (modality_ids, source_rows, positions, rng))
    asked, _, rest = _split(ctx.needs)
    needs = list(asked.leaves)
    grads = _transformed_bwd(grad_out, *own, *ctx.options, mean, rstd, needs, ctx.impl)
    found = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    d = _as_inputs(found, ctx.table_counts, [None] * 4)._replace(table_counts=None)
    return *d, *(None,) * (len(ctx.options) + len(rest))


def _forward_autograd(call: tuple, compute: Callable):
    # At the dispatcher's Autograd key, not by register_autograd: that walks the lists of tensors as trees, which costs
    # 190 us a call, more than the kernel on a short batch.
    if torch.is_grad_enabled():
        leaves = call[0].leaves
        for leaf in leaves:  # not any(): a generator costs a microsecond
            if leaf is not None and leaf.requires_grad:
                statistics: list[Tensor | None] = []
                return _Differentiable.apply(call, compute, statistics, *leaves), *statistics
    return compute(*call)


def _below_autograd(*call):
    return tracing.below_autograd(_computed, _dispatched, call, call[0].modality_weight)


def _dispatched_below_autograd(*call):
    with torch._C._AutoDispatchBelowAutograd():
        return _dispatched(*call)


def _at_autograd_key(*args):
    inputs, options, rest = _split(args)
    compute = _below_autograd
    for t in (*inputs.leaves, inputs.modality_ids, inputs.source_rows, inputs.positions, inputs.rng):
        if t is not None and t.is_meta:  # the dispatcher alone knows what is to be done with these
            compute = _dispatched_below_autograd
            break
    return _filled(*_forward_autograd((inputs, options, *rest), compute))


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError("modality_embed: only first-order gradients exist, of backward there is none")


torch.library.impl("mm::modality_embed_fwd", "Autograd", _at_autograd_key)
torch.library.register_autograd("mm::modality_embed_bwd", _refuse_second_order)
_fwd_op, _bwd_op = torch.ops.mm.modality_embed_fwd.default, torch.ops.mm.modality_embed_bwd.default
_transformed_fwd = transforms.Rule("modality_embed", _fwd_op, _transformed_context, _transformed_backward)
_transformed_bwd = transforms.Rule(
    "modality_embed backward", _one_by_one, lambda ctx, inputs, output: None, _refuse_second_order
)


def modality_embed_fwd(*call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """torch.ops.mm.modality_embed_fwd of Inputs, Options, out_dtype and impl; eager callers reach its autograd without
    the dispatcher's conversions, and may find None for a statistic that the norm does not have."""
    if torch.compiler.is_compiling():
        return _dispatched(*call)
    if transforms.active():
        inputs, options, *rest = call
        return _transformed_fwd(*inputs, *options, *rest)
    return _forward_autograd(call, _below_autograd)


def plain_modality_embed_fwd(*call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """modality_embed_fwd for who has seen that these are plain tensors and nobody looks on."""
    return _forward_autograd(call, _computed)

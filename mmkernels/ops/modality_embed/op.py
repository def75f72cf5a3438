"""Contract of modality_embed: schemas, fakes, autograd.  Imports torch only.

T tokens, E width, M modalities, P position tables (all modalities' in one list), A position axes.
`impl` is a concrete name by the time it gets here; `needs` is a flag for each of Inputs.leaves: one per stream, then
modality_weight, token_weight, one per position table, norm_weight, norm_bias.  A gradient that is not needed comes back
empty: [0].
"""

from __future__ import annotations

from collections.abc import Callable

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
_NUM_INPUTS, _NUM_OPTIONS = len(Inputs._fields), len(Options._fields)


def _split(args: tuple) -> tuple[Inputs, Options, tuple]:
    options = _NUM_INPUTS + _NUM_OPTIONS
    return Inputs(*args[:_NUM_INPUTS]), Options(*args[_NUM_INPUTS:options]), args[options:]


@torch.library.register_fake("mm::modality_embed_fwd")
def _forward_fake(*args):
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
    inputs, _, (_, _, needs, _) = _split(args)
    grads = [
        torch.empty_like(leaf, memory_format=torch.contiguous_format) if n else grad_out.new_empty(0)
        for leaf, n in zip(inputs.leaves, needs, strict=True)
    ]
    return _as_results(grads, len(inputs.streams))


def _computed(*args):
    """out, mean and rstd by an implementation; None or empty for a statistic that the norm does not have."""
    inputs, options, (out_dtype, impl) = _split(args)
    return dispatch.load("modality_embed", impl).forward(inputs, options, out_dtype)


def _gradients(grad_out, *args):
    """In the order of `needs`, None where not needed."""
    inputs, options, (mean, rstd, needs, impl) = _split(args)
    return dispatch.load("modality_embed", impl).backward(grad_out, inputs, options, mean, rstd, needs)


def _filled(out: Tensor, *statistics: Tensor | None) -> tuple[Tensor, ...]:
    """What the operator returns: tensors only."""
    return out, *(out.new_empty(0, dtype=torch.float32) if s is None else s for s in statistics)


def _forward(*args):
    return _filled(*_computed(*args))


def _backward(grad_out, *args):
    grads = [grad_out.new_empty(0) if grad is None else grad for grad in _gradients(grad_out, *args)]
    return _as_results(grads, len(args[0]))


def _as_results(grads: list[Tensor], M: int) -> tuple:
    """As the operator returns them."""
    return grads[:M], grads[M], grads[M + 1], grads[M + 2 : -2], grads[-2], grads[-1]


def _one_by_one(*args) -> tuple[Tensor, ...]:
    """The operator's gradients, in the order of `needs`."""
    d_streams, d_modality, d_token, d_tables, d_norm_weight, d_norm_bias = _bwd_op(*args)
    return *d_streams, d_modality, d_token, *d_tables, d_norm_weight, d_norm_bias


for _device in ("cpu", "cuda"):
    torch.library.impl("mm::modality_embed_fwd", _device, _forward)
    torch.library.impl("mm::modality_embed_bwd", _device, _backward)


class _Differentiable(torch.autograd.Function):
    """args: the operator's, which compute(*args) computes.  leaves: those of them that have gradients, in the order of
    `needs`; the others stay inside the tuple, since autograd looks at each argument.  statistics: a list that takes
    mean and rstd."""

    @staticmethod
    def forward(ctx, args, compute, statistics, *leaves):
        out, mean, rstd = compute(*args)
        statistics += (mean, rstd)
        streams, options, ctx.shapes = args[0], args[_NUM_INPUTS:-2], None
        M = len(streams)
        if options[0] == "none":
            # Backward reads ids and shapes only: do not keep the front ends' outputs alive.
            ctx.shapes = [(s.shape, s.dtype) if s.is_floating_point() else None for s in streams]
            streams = [None if s.is_floating_point() else s for s in streams]
        ctx.rest = (M, args[4], args[7:_NUM_INPUTS], options, args[-1])
        ctx.save_for_backward(*streams, *leaves[M:], mean, rstd)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        transforms.refuse_batched("modality_embed", grad_out)
        M, table_counts, indices, options, impl = ctx.rest
        *leaves, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
        streams = leaves[:M]
        if ctx.shapes is not None:
            # one element that looks like a whole stream
            streams = [
                s if like is None else grad_out.new_empty_strided(like[0], (0, 0), dtype=like[1])
                for s, like in zip(streams, ctx.shapes, strict=True)
            ]
        needs = ctx.needs_input_grad[3:]
        args = (
            grad_out, streams, leaves[M], leaves[M + 1], leaves[M + 2 :], table_counts, norm_weight, norm_bias,
            *indices, *options, mean, rstd, needs, impl,
        )  # fmt: skip
        if torch.is_grad_enabled():  # create_graph=True: the operator's own autograd refuses what follows
            grads = _one_by_one(*args)
        else:
            grads = tracing.below_autograd(_gradients, _one_by_one, args, grad_out)
        return None, None, None, *(d if n else None for d, n in zip(grads, needs, strict=True))


def _transformed_context(ctx, inputs, output):
    own, ctx.options, (_, ctx.impl) = _split(inputs)
    ctx.counts = len(own.streams), own.table_counts
    ctx.save_for_backward(*own.streams, *own.tables, *own[1:3], *own[5:], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _transformed_backward(ctx, grad_out, *_):
    M, table_counts = ctx.counts
    P = sum(table_counts)
    leaves, (*parameters, mean, rstd) = ctx.saved_tensors[: M + P], ctx.saved_tensors[M + P :]
    streams, tables = list(leaves[:M]), list(leaves[M:])
    of_streams, modality, token, of_tables, _, *norm = ctx.needs[:7]
    needs = [*of_streams, modality, token, *of_tables, *norm]
    grads = _transformed_bwd(
        grad_out, streams, *parameters[:2], tables, table_counts, *parameters[2:], *ctx.options, mean, rstd, needs,
        ctx.impl,
    )  # fmt: skip
    found = iter([grad if needed else None for grad, needed in zip(grads, needs, strict=True)])
    d_streams, d_modality, d_token = [next(found) for _ in range(M)], next(found), next(found)
    d_tables = [next(found) for _ in range(P)]
    return d_streams, d_modality, d_token, d_tables, None, *found, *(None,) * (len(ctx.needs) - 7)


def _forward_autograd(args: tuple, compute: Callable):
    # At the dispatcher's Autograd key, not by register_autograd: that walks the lists of tensors as trees, which costs
    # 190 us a call, more than the kernel on a short batch.
    streams, modality_weight, token_weight, tables, _, norm_weight, norm_bias = args[:7]
    leaves = (*streams, modality_weight, token_weight, *tables, norm_weight, norm_bias)
    if torch.is_grad_enabled():
        for leaf in leaves:  # not any(): a generator costs a microsecond
            if leaf is not None and leaf.requires_grad:
                statistics: list[Tensor | None] = []
                return _Differentiable.apply(args, compute, statistics, *leaves), *statistics
    return compute(*args)


def _below_autograd(*args):
    return tracing.below_autograd(_computed, _fwd_op, args, args[1])


def _at_autograd_key(*args):
    return _filled(*_forward_autograd(args, _below_autograd))


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError("modality_embed: only first-order gradients exist, of backward there is none")


torch.library.impl("mm::modality_embed_fwd", "Autograd", _at_autograd_key)
torch.library.register_autograd("mm::modality_embed_bwd", _refuse_second_order)
_fwd_op, _bwd_op = torch.ops.mm.modality_embed_fwd.default, torch.ops.mm.modality_embed_bwd.default
_transformed_fwd = transforms.Rule("modality_embed", _fwd_op, _transformed_context, _transformed_backward)
_transformed_bwd = transforms.Rule(
    "modality_embed backward", _one_by_one, lambda ctx, inputs, output: None, _refuse_second_order
)


def modality_embed_fwd(*args) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """torch.ops.mm.modality_embed_fwd; eager callers reach its autograd without the dispatcher's conversions, and may
    find None for a statistic that the norm does not have."""
    if torch.compiler.is_compiling():
        return _fwd_op(*args)
    if transforms.active():
        return _transformed_fwd(*args)
    return _forward_autograd(args, _below_autograd)


def plain_modality_embed_fwd(*args) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """modality_embed_fwd for who has seen that these are plain tensors and nobody looks on."""
    return _forward_autograd(args, _computed)

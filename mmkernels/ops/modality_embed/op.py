"""Contract of modality_embed: schemas, fakes, autograd.  Imports torch only.

T tokens, E width, M modalities, P position tables (all modalities' in one list), A position axes.
`impl` is a concrete name by the time it gets here; `needs` is one flag per stream, then modality_weight, token_weight,
one per position table, norm_weight, norm_bias.  A gradient that is not needed comes back empty: [0].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import dispatch
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
    M, P = len(inputs.streams), len(inputs.tables)

    def like(tensor, needed):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else grad_out.new_empty(0)

    return (
        [like(s, n) for s, n in zip(inputs.streams, needs[:M], strict=True)],
        like(inputs.modality_weight, needs[M]),
        like(inputs.token_weight, needs[M + 1]),
        [like(t, n) for t, n in zip(inputs.tables, needs[M + 2 : M + 2 + P], strict=True)],
        like(inputs.norm_weight, needs[-2]),
        like(inputs.norm_bias, needs[-1]),
    )


def _forward(*args):
    inputs, options, (out_dtype, impl) = _split(args)
    return dispatch.load("modality_embed", impl).forward(inputs, options, out_dtype)


def _backward(grad_out, *args):
    inputs, options, (mean, rstd, needs, impl) = _split(args)
    return dispatch.load("modality_embed", impl).backward(grad_out, inputs, options, mean, rstd, needs)


for _device in ("cpu", "cuda"):
    torch.library.impl("mm::modality_embed_fwd", _device, _forward)
    torch.library.impl("mm::modality_embed_bwd", _device, _backward)


class _Differentiable(torch.autograd.Function):
    """Takes the tensors one by one, as autograd wants them: streams, tables, then the rest of Inputs in order."""

    @staticmethod
    def forward(ctx, M, P, table_counts, options, out_dtype, impl, *tensors):
        streams, tables, rest = list(tensors[:M]), list(tensors[M : M + P]), tensors[M + P :]
        modality_weight, token_weight, *others = rest
        out, mean, rstd = dispatch.below_autograd(
            _forward,
            torch.ops.mm.modality_embed_fwd,
            (streams, modality_weight, token_weight, tables, table_counts, *others, *options, out_dtype, impl),
            modality_weight,
        )
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.table_counts, ctx.options, ctx.impl, ctx.shapes = (M, P), table_counts, options, impl, None
        if not options.normed:
            # Backward reads ids and shapes only: do not keep the front ends' outputs alive.
            ctx.shapes = [(s.shape, s.dtype) if s.is_floating_point() else None for s in streams]
            streams = [None if s.is_floating_point() else s for s in streams]
        ctx.save_for_backward(*streams, *tables, *rest, mean, rstd)
        return out, mean, rstd

    @staticmethod
    def backward(ctx, grad_out, grad_mean, grad_rstd):
        M, P = ctx.sizes
        wanted = ctx.needs_input_grad[6:]
        if grad_out is None:
            return (None,) * (6 + len(wanted))
        saved = ctx.saved_tensors
        streams, tables = list(saved[:M]), list(saved[M : M + P])
        modality_weight, token_weight, *others, mean, rstd = saved[M + P :]
        if ctx.shapes is not None:
            # one element that looks like a whole stream
            streams = [
                s if like is None else grad_out.new_empty_strided(like[0], (0, 0), dtype=like[1])
                for s, like in zip(streams, ctx.shapes, strict=True)
            ]
        # from the order of the arguments to that of the schema's `needs`
        needs = [*wanted[:M], *wanted[M + P : M + P + 2], *wanted[M : M + P], *wanted[M + P + 2 : M + P + 4]]
        args = (
            grad_out,
            streams,
            modality_weight,
            token_weight,
            tables,
            ctx.table_counts,
            *others,
            *ctx.options,
            mean,
            rstd,
            needs,
            ctx.impl,
        )
        if torch.is_grad_enabled():  # create_graph=True: the operator's own autograd refuses what follows
            grads = torch.ops.mm.modality_embed_bwd(*args)
        else:
            grads = dispatch.below_autograd(_backward, torch.ops.mm.modality_embed_bwd, args, grad_out)
        d_streams, d_modality, d_token, d_tables, d_norm_weight, d_norm_bias = grads
        found = (*d_streams, *d_tables, d_modality, d_token, d_norm_weight, d_norm_bias)
        found = (d if n else None for d, n in zip(found, wanted, strict=False))
        return (None,) * 6 + (*found,) + (None,) * (len(wanted) - M - P - 4)


def _forward_autograd(*args):
    # At the dispatcher's Autograd key, not by register_autograd: that walks the lists of tensors as trees, which costs
    # 190 us a call, more than the kernel on a short batch.
    inputs, options, (out_dtype, impl) = _split(args)
    tensors = (
        *inputs.streams,
        *inputs.tables,
        inputs.modality_weight,
        inputs.token_weight,
        inputs.norm_weight,
        inputs.norm_bias,
        inputs.modality_ids,
        inputs.source_rows,
        inputs.positions,
        inputs.rng,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        M, P = len(inputs.streams), len(inputs.tables)
        return _Differentiable.apply(M, P, inputs.table_counts, options, out_dtype, impl, *tensors)
    return dispatch.below_autograd(_forward, torch.ops.mm.modality_embed_fwd, args, inputs.modality_weight)


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError("modality_embed: only first-order gradients are there; backward has no gradient")


torch.library.impl("mm::modality_embed_fwd", "Autograd", _forward_autograd)
torch.library.register_autograd("mm::modality_embed_bwd", _refuse_second_order)


def modality_embed_fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.mm.modality_embed_fwd; eager callers reach its autograd without the dispatcher's conversions."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.ops.mm.modality_embed_fwd(*args)
    return _forward_autograd(*args)

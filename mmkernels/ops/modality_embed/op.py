"""Contract of modality_embed: schemas, fakes, autograd.  Imports torch only.

T tokens, E width, M modalities, P position tables (all modalities' in one list), A position axes.
`impl` is a concrete name by the time it gets here; `needs` is one flag per stream, then modality_weight, token_weight,
one per position table, norm_weight, norm_bias.  A gradient that is not needed comes back empty: [0].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import dispatch
from mmkernels.ops.modality_embed.inputs import Inputs

_INPUTS = (
    "Tensor[] streams, Tensor modality_weight, Tensor? token_weight, Tensor[] tables, int[] table_counts, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor modality_ids, Tensor source_rows, Tensor positions"
)
torch.library.define(
    "mm::modality_embed_fwd",
    f"({_INPUTS}, str norm, float eps, ScalarType out_dtype, str impl) -> (Tensor out, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "mm::modality_embed_bwd",
    f"(Tensor grad_out, {_INPUTS}, Tensor mean, Tensor rstd, str norm, bool[] needs, str impl) -> "
    "(Tensor[] d_streams, Tensor d_modality, Tensor d_token, Tensor[] d_tables, "
    "Tensor d_norm_weight, Tensor d_norm_bias)",
)


@torch.library.register_fake("mm::modality_embed_fwd")
def _forward_fake(streams, modality_weight, *rest):
    modality_ids, norm, out_dtype = rest[5], rest[8], rest[10]
    T = modality_ids.shape[0]
    stats = torch.float64 if out_dtype == torch.float64 else torch.float32
    rows = 0 if norm == "none" else T
    return (
        modality_weight.new_empty((T, modality_weight.shape[1]), dtype=out_dtype),
        modality_weight.new_empty((rows,), dtype=stats),
        modality_weight.new_empty((rows,), dtype=stats),
    )


@torch.library.register_fake("mm::modality_embed_bwd")
def _backward_fake(grad_out, streams, modality_weight, token_weight, tables, *rest):
    norm_weight, norm_bias, needs = rest[1], rest[2], rest[9]
    M, P = len(streams), len(tables)

    def like(tensor, needed):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else grad_out.new_empty(0)

    return (
        [like(s, n) for s, n in zip(streams, needs[:M], strict=True)],
        like(modality_weight, needs[M]),
        like(token_weight, needs[M + 1]),
        [like(t, n) for t, n in zip(tables, needs[M + 2 : M + 2 + P], strict=True)],
        like(norm_weight, needs[-2]),
        like(norm_bias, needs[-1]),
    )


def _forward(*args):
    *inputs, norm, eps, out_dtype, impl = args
    return dispatch.load("modality_embed", impl).forward(Inputs(*inputs), norm, eps, out_dtype)


def _backward(grad_out, *args):
    *inputs, mean, rstd, norm, needs, impl = args
    return dispatch.load("modality_embed", impl).backward(grad_out, Inputs(*inputs), mean, rstd, norm, needs)


for _device in ("cpu", "cuda"):
    torch.library.impl("mm::modality_embed_fwd", _device, _forward)
    torch.library.impl("mm::modality_embed_bwd", _device, _backward)


_NOT_DIFFERENTIABLE = (None,) * 7  # modality_ids, source_rows, positions, norm, eps, out_dtype, impl


def _setup_context(ctx, inputs, output):
    (
        streams,
        modality_weight,
        token_weight,
        tables,
        ctx.table_counts,
        norm_weight,
        norm_bias,
        *indices,
        ctx.norm,
        _,
        _,
        ctx.impl,
    ) = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    if ctx.norm == "none":
        # Backward reads ids and shapes only: do not keep the front ends' outputs alive.
        streams = [_shape_of(s) if s.is_floating_point() else s for s in streams]
    ctx.num_streams, ctx.num_tables = len(streams), len(tables)
    ctx.save_for_backward(
        *streams, *tables, modality_weight, token_weight, norm_weight, norm_bias, *indices, mean, rstd
    )


def _backward_formula(ctx, grad_out, grad_mean, grad_rstd):
    M, P = ctx.num_streams, ctx.num_tables
    needed = ctx.needs_input_grad
    if grad_out is None:
        return [None] * M, None, None, [None] * P, None, None, None, *_NOT_DIFFERENTIABLE
    saved = list(ctx.saved_tensors)
    streams, tables, saved = saved[:M], saved[M : M + P], saved[M + P :]
    modality_weight, token_weight, norm_weight, norm_bias, *indices, mean, rstd = saved
    needs = [*needed[0], needed[1], needed[2], *(needed[3] if P else ()), needed[5], needed[6]]
    d_streams, d_modality, d_token, d_tables, d_norm_weight, d_norm_bias = torch.ops.mm.modality_embed_bwd(
        grad_out,
        streams,
        modality_weight,
        token_weight,
        tables,
        ctx.table_counts,
        norm_weight,
        norm_bias,
        *indices,
        mean,
        rstd,
        ctx.norm,
        needs,
        ctx.impl,
    )
    return (
        [d if n else None for d, n in zip(d_streams, needs[:M], strict=True)],
        d_modality if needs[M] else None,
        d_token if needs[M + 1] else None,
        [d if n else None for d, n in zip(d_tables, needs[M + 2 : M + 2 + P], strict=True)],
        None,
        d_norm_weight if needs[-2] else None,
        d_norm_bias if needs[-1] else None,
        *_NOT_DIFFERENTIABLE,
    )


def _shape_of(stream: Tensor) -> Tensor:
    """One element that looks like the whole stream."""
    return stream.new_zeros(()).expand(stream.shape)


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError("modality_embed: only first-order gradients are there; backward has no gradient")


torch.library.register_autograd("mm::modality_embed_fwd", _backward_formula, setup_context=_setup_context)
torch.library.register_autograd("mm::modality_embed_bwd", _refuse_second_order)


def modality_embed_fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the registered operator; arguments as in its schema."""
    return torch.ops.mm.modality_embed_fwd(*args)

"""Modality embedding by the C++ extension: allocates and calls csrc/cpu/modality_embed*.cpp.   T tokens, E width."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import native
from mmkernels.ops.modality_embed.inputs import Inputs, Options
from mmkernels.philox import threshold

_INPUTS = "Tensor[] streams, Tensor modality_weight, Tensor? token_weight, Tensor[] tables, int[] table_counts"
_INDICES = "Tensor modality_ids, Tensor source_rows, Tensor positions"
_DROPOUT = "Tensor? rng, int threshold, float scale"
torch.library.define(
    "mm_cpp::modality_embed_fwd",
    f"({_INPUTS}, Tensor? norm_weight, Tensor? norm_bias, {_INDICES}, {_DROPOUT}, int norm, float eps, "
    "Tensor(a!) out, Tensor(b!) mean, Tensor(c!) rstd) -> ()",
)
torch.library.define(
    "mm_cpp::modality_embed_bwd",
    f"(Tensor grad_out, {_INPUTS}, Tensor? norm_weight, {_INDICES}, Tensor mean, Tensor rstd, {_DROPOUT}, int norm, "
    "Tensor(a!)[] d_streams, Tensor(b!)? d_modality, Tensor(c!)? d_token, Tensor(d!)[] d_tables, "
    "Tensor(e!)? d_norm_weight, Tensor(f!)? d_norm_bias) -> ()",
)
native.load_cpu_ops()  # implements what is defined above

_NORMS = {"none": 0, "layernorm": 1, "rmsnorm": 2}  # enum Norm


def forward(inputs: Inputs, options: Options, out_dtype: torch.dtype):
    """As in reference.forward."""
    T, E = inputs.modality_ids.shape[0], inputs.modality_weight.shape[1]
    out = torch.empty((T, E), dtype=out_dtype)
    mean = torch.empty(T if options.centred else 0)
    rstd = torch.empty(T if options.normed else 0)
    torch.ops.mm_cpp.modality_embed_fwd(
        _contiguous(inputs.streams),
        *_parameters(inputs),
        _float(inputs.norm_weight),
        _float(inputs.norm_bias),
        *_indices(inputs),
        *_dropout(inputs, options),
        _NORMS[options.norm],
        options.eps,
        out,
        mean,
        rstd,
    )
    return out, mean, rstd


def backward(grad_out: Tensor, inputs: Inputs, options: Options, mean: Tensor, rstd: Tensor, needs: list[bool]):
    """As in reference.backward."""
    M, P = len(inputs.streams), len(inputs.tables)
    nothing = grad_out.new_empty(0)

    def fresh(like: Tensor | None, needed: bool) -> Tensor | None:
        return torch.empty(like.shape) if needed else None  # gradients of parameters are summed in fp32

    d_streams = [
        torch.empty(s.shape, dtype=s.dtype) if n else nothing for s, n in zip(inputs.streams, needs[:M], strict=True)
    ]
    d_modality = fresh(inputs.modality_weight, needs[M])
    d_token = fresh(inputs.token_weight, needs[M + 1])
    d_tables = [fresh(t, n) for t, n in zip(inputs.tables, needs[M + 2 : M + 2 + P], strict=True)]
    d_norm_weight = fresh(inputs.norm_weight, needs[-2])
    d_norm_bias = fresh(inputs.norm_bias, needs[-1])
    torch.ops.mm_cpp.modality_embed_bwd(
        grad_out.contiguous(),
        # without a norm the streams' values are not read, and may be stand-ins
        _contiguous(inputs.streams) if options.normed else [_ids(s) for s in inputs.streams],
        *_parameters(inputs),
        _float(inputs.norm_weight),
        *_indices(inputs),
        mean,
        rstd,
        *_dropout(inputs, options),
        _NORMS[options.norm],
        d_streams,
        d_modality,
        d_token,
        [nothing if d is None else d for d in d_tables],
        d_norm_weight,
        d_norm_bias,
    )

    def finish(value: Tensor | None, like: Tensor | None) -> Tensor:
        if value is None:
            return grad_out.new_empty(0)
        return value if value.dtype == like.dtype else value.to(like.dtype)

    return (
        [d if n else grad_out.new_empty(0) for d, n in zip(d_streams, needs[:M], strict=True)],
        finish(d_modality, inputs.modality_weight),
        finish(d_token, inputs.token_weight),
        [finish(d, t) for d, t in zip(d_tables, inputs.tables, strict=True)],
        finish(d_norm_weight, inputs.norm_weight),
        finish(d_norm_bias, inputs.norm_bias),
    )


def _parameters(inputs: Inputs) -> tuple:
    token_weight = inputs.token_weight
    return (
        inputs.modality_weight.contiguous(),
        None if token_weight is None else token_weight.contiguous(),
        _contiguous(inputs.tables),
        inputs.table_counts,
    )


def _indices(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.modality_ids.contiguous(), inputs.source_rows.contiguous(), inputs.positions.contiguous()


def _dropout(inputs: Inputs, options: Options) -> tuple[Tensor | None, int, float]:
    if inputs.rng is None:
        return None, 0, 1.0
    return inputs.rng.contiguous(), threshold(options.dropout_p), 1.0 / (1.0 - options.dropout_p)


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _ids(stream: Tensor) -> Tensor:
    return stream if stream.is_floating_point() else stream.contiguous()


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.float32).contiguous()

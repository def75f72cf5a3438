"""Modality embedding by the C++ extension: allocates and calls csrc/cpu/modality_embed.cpp.   T tokens, E width."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import native
from mmkernels.ops.modality_embed.inputs import Inputs

_INPUTS = "Tensor[] streams, Tensor modality_weight, Tensor? token_weight, Tensor[] tables, int[] table_counts"
_INDICES = "Tensor modality_ids, Tensor source_rows, Tensor positions"
torch.library.define(
    "mm_cpp::modality_embed_fwd",
    f"({_INPUTS}, Tensor? norm_weight, Tensor? norm_bias, {_INDICES}, bool normalize, float eps, "
    "Tensor(a!) out, Tensor(b!) mean, Tensor(c!) rstd) -> ()",
)
torch.library.define(
    "mm_cpp::modality_embed_bwd",
    f"(Tensor grad_out, {_INPUTS}, Tensor? norm_weight, {_INDICES}, Tensor mean, Tensor rstd, bool normalize, "
    "Tensor(a!)[] d_streams, Tensor(b!)? d_modality, Tensor(c!)? d_token, Tensor(d!)[] d_tables, "
    "Tensor(e!)? d_norm_weight, Tensor(f!)? d_norm_bias) -> ()",
)
native.load_cpu_ops()  # implements what is defined above


def forward(inputs: Inputs, norm: str, eps: float, out_dtype: torch.dtype):
    """As in reference.forward."""
    T, normalize = inputs.modality_ids.shape[0], norm != "none"
    out = torch.empty((T, inputs.modality_weight.shape[1]), dtype=out_dtype)
    mean, rstd = (torch.empty(T if normalize else 0, dtype=torch.float32) for _ in range(2))
    torch.ops.mm_cpp.modality_embed_fwd(
        _contiguous(inputs.streams),
        inputs.modality_weight.contiguous(),
        None if inputs.token_weight is None else inputs.token_weight.contiguous(),
        _contiguous(inputs.tables),
        inputs.table_counts,
        _float(inputs.norm_weight),
        _float(inputs.norm_bias),
        inputs.modality_ids.contiguous(),
        inputs.source_rows.contiguous(),
        inputs.positions.contiguous(),
        normalize,
        eps,
        out,
        mean,
        rstd,
    )
    return out, mean, rstd


def backward(grad_out: Tensor, inputs: Inputs, mean: Tensor, rstd: Tensor, norm: str, needs: list[bool]):
    """As in reference.backward."""
    M, P, normalize = len(inputs.streams), len(inputs.tables), norm != "none"

    def fresh(make, like: Tensor | None, needed: bool, dtype: torch.dtype | None = torch.float32) -> Tensor | None:
        return make(like.shape, dtype=dtype or like.dtype) if needed else None

    d_streams = [fresh(torch.empty, s, n, None) for s, n in zip(inputs.streams, needs[:M], strict=True)]
    d_modality = fresh(torch.empty, inputs.modality_weight, needs[M])
    d_token = fresh(torch.zeros, inputs.token_weight, needs[M + 1])
    d_tables = [fresh(torch.zeros, t, n) for t, n in zip(inputs.tables, needs[M + 2 : M + 2 + P], strict=True)]
    d_norm_weight = fresh(torch.empty, inputs.norm_weight, needs[-2])
    d_norm_bias = fresh(torch.empty, inputs.norm_bias, needs[-1])
    nothing = grad_out.new_empty(0)
    torch.ops.mm_cpp.modality_embed_bwd(
        grad_out.contiguous(),
        # without a norm the streams' values are not read, and may be stand-ins
        _contiguous(inputs.streams)
        if normalize
        else [s if s.is_floating_point() else s.contiguous() for s in inputs.streams],
        inputs.modality_weight.contiguous(),
        None if inputs.token_weight is None else inputs.token_weight.contiguous(),
        _contiguous(inputs.tables),
        inputs.table_counts,
        _float(inputs.norm_weight),
        inputs.modality_ids.contiguous(),
        inputs.source_rows.contiguous(),
        inputs.positions.contiguous(),
        mean,
        rstd,
        normalize,
        [nothing if d is None else d for d in d_streams],
        d_modality,
        d_token,
        [nothing if d is None else d for d in d_tables],
        d_norm_weight,
        d_norm_bias,
    )

    def finish(value: Tensor | None, like: Tensor | None) -> Tensor:
        return grad_out.new_empty(0) if value is None else value.to(like.dtype)

    return (
        [finish(d, s) for d, s in zip(d_streams, inputs.streams, strict=True)],
        finish(d_modality, inputs.modality_weight),
        finish(d_token, inputs.token_weight),
        [finish(d, t) for d, t in zip(d_tables, inputs.tables, strict=True)],
        finish(d_norm_weight, inputs.norm_weight),
        finish(d_norm_bias, inputs.norm_bias),
    )


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.float32).contiguous()

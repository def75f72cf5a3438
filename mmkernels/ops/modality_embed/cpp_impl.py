"""Modality embedding by the C++ extension: one call each way, of csrc/bindings/modality_embed_python.cpp or, where that
will not, by the dispatcher of csrc/bindings/modality_embed.cpp.   E width."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import direct, native
from mmkernels.ops.modality_embed.inputs import NORM_CODES, Inputs, Options

native.load_cpu_ops()  # before the schemas, which a second try could not define again; it implements them
_INPUTS = "Tensor[] streams, Tensor modality_weight, Tensor? token_weight, Tensor[] tables, int[] table_counts"
_INDICES = "Tensor modality_ids, Tensor source_rows, Tensor positions, Tensor? rng"
torch.library.define(
    "mm_cpp::modality_embed_fwd",
    f"({_INPUTS}, Tensor? norm_weight, Tensor? norm_bias, {_INDICES}, int norm, float eps, float dropout_p, "
    "ScalarType? out_dtype) -> Tensor[]",
)
torch.library.define(
    "mm_cpp::modality_embed_bwd",
    f"(Tensor grad_out, {_INPUTS}, Tensor? norm_weight, {_INDICES}, int norm, float dropout_p, "
    "Tensor? mean, Tensor? rstd, int[] needs) -> Tensor[]",
)
_fwd, _bwd = torch.ops.mm_cpp.modality_embed_fwd.default, torch.ops.mm_cpp.modality_embed_bwd.default
_direct_fwd, _direct_bwd = direct.function("modality_embed_fwd"), direct.function("modality_embed_bwd")


def forward(inputs: Inputs, options: Options, out_dtype: torch.dtype | None):
    """As in reference.forward; out_dtype None: what the streams promote to.  Statistics that are not there are None."""
    norm = NORM_CODES[options.norm]
    found = _direct_fwd(*inputs, norm, options.eps, options.dropout_p, out_dtype)
    if found is not None:
        return found
    out, *statistics = _fwd(*inputs, norm, options.eps, options.dropout_p, out_dtype)
    rstd = statistics.pop() if statistics else None
    return out, statistics[0] if statistics else None, rstd


def backward(
    grad_out: Tensor, inputs: Inputs, options: Options, mean: Tensor | None, rstd: Tensor | None, needs: list[bool]
):
    """As in reference.backward."""
    norm = NORM_CODES[options.norm]
    mean, rstd = (mean if options.centred else None), (rstd if options.normed else None)
    gradients = _direct_bwd(*inputs, norm, options.dropout_p, grad_out, mean, rstd, tuple(needs))
    if gradients is not None:
        return gradients
    found = iter(_bwd(grad_out, *inputs[:6], *inputs[7:], norm, options.dropout_p, mean, rstd, needs))
    return [next(found) if needed else None for needed in needs]

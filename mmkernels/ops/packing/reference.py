"""packing in plain PyTorch, segment by segment: the definition.

T tokens, E width, M modalities, N segments, R gathered rows.  Sums are in fp32, in fp64 for fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(streams: list[Tensor], segments: Tensor, total: int) -> Tensor:
    """[T, E]: the rows of each segment, taken from its modality's stream."""
    out = streams[0].new_empty((total, streams[0].shape[1]))
    pack_out(streams, segments, out)
    return out


def pack_out(streams: list[Tensor], segments: Tensor, out: Tensor) -> None:
    token = 0
    for _, modality, length, row in segments.tolist():
        out[token : token + length] = streams[modality][row : row + length]
        token += length


def unpack(packed: Tensor, segments: Tensor, stream_lengths: list[int]) -> list[Tensor]:
    """M streams, each [N_m, E]."""
    streams = [packed.new_empty((rows, packed.shape[1])) for rows in stream_lengths]
    token = 0
    for _, modality, length, row in segments.tolist():
        streams[modality][row : row + length] = packed[token : token + length]
        token += length
    return streams


def gather_rows(packed: Tensor, rows: Tensor) -> Tensor:
    return packed[rows.long()]


def scatter_rows_sum(grad: Tensor, rows: Tensor, total: int) -> Tensor:
    """[T, E]: out[t] is the sum of grad[r] over rows[r] == t."""
    out = torch.zeros((total, grad.shape[1]), dtype=sum_dtype(grad), device=grad.device)
    return out.index_add_(0, rows.long(), grad.to(out.dtype)).to(grad.dtype)


def segment_mean(packed: Tensor, bounds: Tensor) -> Tensor:
    """[N, E]: mean over the tokens of each segment, 0 where it has none."""
    out = packed.new_zeros((len(bounds) - 1, packed.shape[1]))
    for n, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if end > begin:
            out[n] = packed[begin:end].to(sum_dtype(packed)).mean(0).to(packed.dtype)
    return out


def segment_mean_backward(grad: Tensor, bounds: Tensor, total: int) -> Tensor:
    """[T, E]: each token's share of its segment's gradient."""
    out = grad.new_empty((total, grad.shape[1]))
    for n, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if end > begin:
            out[begin:end] = (grad[n].to(sum_dtype(grad)) / (end - begin)).to(grad.dtype)
    return out


def sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

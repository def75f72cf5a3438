"""packing by PyTorch's own kernels, one per modality: GPUs, and CPUs where the extension is not built.

T tokens, E width, M modalities, N segments, R gathered rows, n tokens of one modality.
On a GPU the indices of pack and unpack cross from the host on each call, and scatter_rows_sum adds in any order
(unless torch.use_deterministic_algorithms is on).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(streams: list[Tensor], segments: Tensor, total: int) -> Tensor:
    """As in reference.pack."""
    out = streams[0].new_empty((total, streams[0].shape[1]))
    pack_out(streams, segments, out)
    return out


def pack_out(streams: list[Tensor], segments: Tensor, out: Tensor) -> None:
    for stream, tokens in zip(streams, _tokens_of_streams(segments, len(streams), out.device), strict=True):
        out.index_copy_(0, tokens, stream)


def unpack(packed: Tensor, segments: Tensor, stream_lengths: list[int]) -> list[Tensor]:
    """As in reference.unpack."""
    tokens = _tokens_of_streams(segments, len(stream_lengths), packed.device)
    return [packed.index_select(0, of_stream) for of_stream in tokens]


def gather_rows(packed: Tensor, rows: Tensor) -> Tensor:
    return packed.index_select(0, rows)


def scatter_rows_sum(grad: Tensor, rows: Tensor, total: int) -> Tensor:
    out = torch.zeros((total, grad.shape[1]), dtype=_sum_dtype(grad), device=grad.device)
    return out.index_add_(0, rows, grad.to(out.dtype)).to(grad.dtype)


def segment_mean(packed: Tensor, bounds: Tensor) -> Tensor:
    lengths = bounds.diff()
    wide = packed.to(_sum_dtype(packed))
    sums = torch.segment_reduce(wide, "sum", lengths=lengths.long(), axis=0, unsafe=True, initial=0)  # [N, E]
    return (sums / lengths.clamp(min=1)[:, None]).to(packed.dtype)


def segment_mean_backward(grad: Tensor, bounds: Tensor, total: int) -> Tensor:
    lengths = bounds.diff()
    shares = (grad.to(_sum_dtype(grad)) / lengths.clamp(min=1)[:, None]).to(grad.dtype)  # [N, E]
    return shares.repeat_interleave(lengths, dim=0, output_size=total)


def _tokens_of_streams(segments: Tensor, M: int, device: torch.device) -> list[Tensor]:
    """Per modality: the packed token of each of its stream's rows, int64 [n]."""
    _, modality, length, first_row = segments.numpy().astype(np.int64).T
    end = np.cumsum(length)
    tokens = np.arange(end[-1] if len(end) else 0)
    segment = np.repeat(np.arange(len(length)), length)
    row = tokens - (end - length - first_row)[segment]
    of_stream = []
    for m in range(M):
        mine = np.flatnonzero(modality[segment] == m)
        order = np.empty_like(mine)
        order[row[mine]] = mine
        of_stream.append(torch.from_numpy(order).to(device))
    return of_stream


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

"""packing in plain PyTorch, segment by segment: the definition.

T tokens, E width, B samples, L padded length, M modalities, N segments, R gathered rows.  Sums are in fp32, in fp64
for fp64.  Every function writes `out`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(streams: list[Tensor], segments: Tensor, modality_ids: Tensor, source_rows: Tensor, out: Tensor) -> None:
    """[T, E]: the rows of each segment, taken from its modality's stream."""
    token = 0
    for _, modality, length, row in segments.tolist():
        out[token : token + length] = streams[modality][row : row + length]
        token += length


def unpack(packed: Tensor, segments: Tensor, modality_ids: Tensor, source_rows: Tensor, out: list[Tensor]) -> None:
    """M streams, each [N_m, E]."""
    token = 0
    for _, modality, length, row in segments.tolist():
        out[modality][row : row + length] = packed[token : token + length]
        token += length


def pad(packed: Tensor, bounds: Tensor, out: Tensor, mask: Tensor) -> None:
    """[B, L, E], each sample's tokens and then zeros; mask [B, L] is True at tokens."""
    out.zero_()
    mask.zero_()
    for b, (begin, end) in enumerate(_pairs(bounds)):
        out[b, : end - begin] = packed[begin:end]
        mask[b, : end - begin] = True


def unpad(padded: Tensor, bounds: Tensor, out: Tensor) -> None:
    """[T, E] from [B, L, E]: each sample's tokens, one sample after another."""
    for b, (begin, end) in enumerate(_pairs(bounds)):
        out[begin:end] = padded[b, : end - begin]


def gather_rows(packed: Tensor, rows: Tensor, out: Tensor) -> None:
    """[R, E]: out[r] = packed[rows[r]]."""
    out.copy_(packed.index_select(0, rows))  # not by [rows]: that misreads negated rows and zeros without memory


def scatter_rows_sum(grad: Tensor, rows: Tensor, out: Tensor) -> None:
    """[T, E]: out[t] is the sum of grad[r] over rows[r] == t."""
    sums = torch.zeros(out.shape, dtype=sum_dtype(grad), device=grad.device)
    out.copy_(sums.index_add_(0, rows.long(), grad.to(sums.dtype)))


def segment_mean(packed: Tensor, bounds: Tensor, out: Tensor) -> None:
    """[N, E]: mean over the tokens of each segment, 0 where it has none."""
    out.zero_()
    for n, (begin, end) in enumerate(_pairs(bounds)):
        if end > begin:
            out[n] = packed[begin:end].to(sum_dtype(packed)).mean(0)


def segment_mean_backward(grad: Tensor, bounds: Tensor, out: Tensor) -> None:
    """[T, E]: each token's share of its segment's gradient."""
    for n, (begin, end) in enumerate(_pairs(bounds)):
        if end > begin:
            out[begin:end] = grad[n].to(sum_dtype(grad)) / (end - begin)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _pairs(bounds: Tensor) -> zip:
    return zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)

"""packing by PyTorch's own kernels: GPUs and CPUs where the extension is not built.  Nothing crosses from the host.

T tokens, E width, B samples, L padded length, M modalities, N segments, R gathered rows.  Every function writes `out`.
On a GPU scatter_rows_sum adds in any order (unless torch.use_deterministic_algorithms is on).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(streams: list[Tensor], segments: Tensor, modality_ids: Tensor, source_rows: Tensor, out: Tensor) -> None:
    tokens = _tokens_of_rows([len(s) for s in streams], modality_ids, source_rows)
    for stream, of_stream in zip(streams, tokens, strict=True):
        _as_known(out).index_copy_(0, of_stream, _as_known(stream))


def unpack(packed: Tensor, segments: Tensor, modality_ids: Tensor, source_rows: Tensor, out: list[Tensor]) -> None:
    tokens = _tokens_of_rows([len(s) for s in out], modality_ids, source_rows)
    for stream, of_stream in zip(out, tokens, strict=True):
        torch.index_select(packed, 0, of_stream, out=stream)


def pad(packed: Tensor, bounds: Tensor, out: Tensor, mask: Tensor) -> None:
    torch.lt(torch.arange(out.shape[1], device=out.device), bounds.diff()[:, None], out=mask)
    out.zero_()
    rows = _padded_rows(bounds, out.shape[1], len(packed))
    _as_known(out).flatten(0, 1).index_copy_(0, rows, _as_known(packed))


def unpad(padded: Tensor, bounds: Tensor, out: Tensor) -> None:
    torch.index_select(padded.flatten(0, 1), 0, _padded_rows(bounds, padded.shape[1], len(out)), out=out)


def gather_rows(packed: Tensor, rows: Tensor, out: Tensor) -> None:
    torch.index_select(packed, 0, rows, out=out)


def scatter_rows_sum(grad: Tensor, rows: Tensor, out: Tensor) -> None:
    sums = out if out.dtype == _sum_dtype(grad) else torch.empty_like(out, dtype=_sum_dtype(grad))
    sums.zero_().index_add_(0, rows, grad.to(sums.dtype))
    if sums is not out:
        out.copy_(sums)


def segment_mean(packed: Tensor, bounds: Tensor, out: Tensor) -> None:
    lengths = bounds.diff()
    wide = packed.to(_sum_dtype(packed))
    # unsafe: unchecked, since a GPU would have to be waited for, and of no segment torch looks for the shortest
    unsafe = not (packed.is_cpu and lengths.numel())
    sums = torch.segment_reduce(wide, "sum", lengths=lengths.long(), axis=0, unsafe=unsafe, initial=0)  # [N, E]
    out.copy_(sums / lengths.clamp(min=1)[:, None])


def segment_mean_backward(grad: Tensor, bounds: Tensor, out: Tensor) -> None:
    lengths = bounds.diff()
    shares = (grad.to(_sum_dtype(grad)) / lengths.clamp(min=1)[:, None]).to(grad.dtype)  # [N, E]
    out.copy_(shares.repeat_interleave(lengths, dim=0, output_size=len(out)))


# What index_copy_ has no kernel for, and what has as many bytes.
_UNKNOWN = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64} | dict.fromkeys(
    (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.uint8,
)


def _as_known(tensor: Tensor) -> Tensor:
    return tensor.view(_UNKNOWN[tensor.dtype]) if tensor.dtype in _UNKNOWN else tensor


def _tokens_of_rows(stream_lengths: list[int], modality_ids: Tensor, source_rows: Tensor) -> tuple[Tensor, ...]:
    """Per modality: the packed token of each row of its stream, int64 [N_m]."""
    joint = source_rows.long()  # row in the concatenated streams
    for m, rows in enumerate(stream_lengths[:-1]):
        joint += rows * (modality_ids > m)
    # -1, not empty: rows of a table that was written over, of which none is that of some token, are no index then
    tokens = torch.full_like(joint, -1).index_copy_(0, joint, torch.arange(len(joint), device=joint.device))
    return tokens.split(stream_lengths)


def _padded_rows(bounds: Tensor, length: int, total: int) -> Tensor:
    """Row of each token in [B * L, E], int64 [T]."""
    gaps = length * torch.arange(len(bounds) - 1, device=bounds.device) - bounds[:-1]  # [B]
    return torch.arange(total, device=bounds.device) + gaps.repeat_interleave(bounds.diff(), output_size=total)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

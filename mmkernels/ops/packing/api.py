"""packing: what the user calls, with its checks.

T tokens, E width, M modalities, N segments, N_m rows of modality m's stream, R gathered rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmkernels import dispatch
from mmkernels.layout import PackedLayout
from mmkernels.ops.packing import op
from mmkernels.planner import PackPlan, plan_packs

__all__ = ["PackPlan", "gather_rows", "pack", "plan_packs", "segment_mean", "unpack"]

SUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pack(
    streams: Sequence[Tensor | None], layout: PackedLayout, *, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Rows of all streams in the packed order: [T, E].  The inverse of `unpack`, which is also its gradient.

    streams  per modality [N_m, E], one width and dtype (any); None where the batch has no row of it.  Rows may lie
             apart (views of a wider tensor); the copy follows the layout's segment table
    out      [T, E] to write into, apart from the streams; warm memory saves the page faults that cost more than the
             copy.  No gradient then

    Raises ValueError for streams that do not fit the layout, for a layout with special tokens (their rows come from
    a token table: use modality_embed) and for a layout from cu_seqlens (it does not know its streams).
    """
    segments = _segments("pack", layout)
    streams = _streams(streams, layout)
    chosen = _resolve(impl, streams[0])
    if out is None:
        return op.pack(streams, segments, layout.total_tokens, chosen)
    _check_out(out, streams, layout)
    op.pack_out(streams, segments, out, chosen)
    return out


def unpack(packed: Tensor, layout: PackedLayout, *, impl: str = "auto") -> list[Tensor]:
    """The M streams [N_m, E] whose pack is packed [T, E], as new tensors, any dtype.  Errors as `pack`."""
    segments = _segments("unpack", layout)
    _check_packed("unpack", packed, layout)
    return op.unpack(packed, segments, list(layout.stream_lengths), _resolve(impl, packed))


def gather_rows(packed: Tensor, rows: Tensor, *, impl: str = "auto") -> Tensor:
    """packed[rows]: [R, E] from packed [T, E], any dtype, and rows [R], int32 or int64, in any order.

    The gradient sums the rows that repeat, in fp32 (fp64 for fp64), in the order of `rows`.
    Raises ValueError for a row outside [0, T) on CPU; on a GPU the range is the caller's promise.
    """
    if packed.ndim != 2:
        raise ValueError(f"gather_rows: packed has shape {list(packed.shape)}, expected [T, E]")
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gather_rows: rows is {rows.dtype} {list(rows.shape)}, expected int32 or int64 [R]")
    if rows.device != packed.device:
        raise ValueError(f"gather_rows: rows is on {rows.device}, packed on {packed.device}")
    if packed.requires_grad and packed.dtype not in SUM_DTYPES:
        raise ValueError(f"gather_rows: packed is {packed.dtype}, its gradient needs {_names(SUM_DTYPES)}")
    return op.gather_rows(packed, rows, _resolve(impl, packed))


def segment_mean(packed: Tensor, layout: PackedLayout, *, impl: str = "auto") -> Tensor:
    """Mean of each segment's tokens (its special token included): [N, E] from packed [T, E]; 0 for an empty segment.

    Sums in fp32 (fp64 for fp64), in token order.  For a layout from cu_seqlens a segment is a sample.
    Raises ValueError for packed of another length or a dtype that has no mean.
    """
    _check_packed("segment_mean", packed, layout)
    if packed.dtype not in SUM_DTYPES:
        raise ValueError(f"segment_mean: packed is {packed.dtype}, expected {_names(SUM_DTYPES)}")
    return op.segment_mean(packed, layout.segment_cu_seqlens, _resolve(impl, packed))


def _resolve(impl: str, tensor: Tensor) -> str:
    return dispatch.resolve("packing", impl, device=tensor.device, dtype=tensor.dtype)


def _segments(function: str, layout: PackedLayout) -> Tensor:
    """The layout's segment table as a host tensor, made once."""
    if layout.segments is None:
        raise ValueError(f"{function}: the layout comes from cu_seqlens and does not know its streams")
    special = [m for m, token in enumerate(layout.special_tokens or ()) if token is not None]
    if special:
        raise ValueError(
            f"{function}: segments of modality {special[0]} start with a special token, whose row is in no stream; "
            "modality_embed packs such a layout"
        )
    table = layout.cache.get("segment_table")
    if table is None:
        table = layout.cache["segment_table"] = torch.from_numpy(np.array(layout.segments))
    return table


def _streams(streams: Sequence[Tensor | None], layout: PackedLayout) -> list[Tensor]:
    """Every stream as a tensor, checked against the layout and one another."""
    if len(streams) != layout.num_modalities:
        raise ValueError(f"pack: got {len(streams)} streams, expected {layout.num_modalities} as in the layout")
    present = next((s for s in streams if s is not None), None)
    if present is None:
        raise ValueError("pack: every stream is None, expected at least one (it may have no rows)")
    if present.ndim != 2:
        raise ValueError(f"pack: a stream has shape {list(present.shape)}, expected [rows, E]")
    streams = [present.new_empty((0, present.shape[1])) if s is None else s for s in streams]
    for m, (stream, rows) in enumerate(zip(streams, layout.stream_lengths, strict=True)):
        if tuple(stream.shape) != (rows, present.shape[1]):
            raise ValueError(f"pack: stream {m} has shape {list(stream.shape)}, expected [{rows}, {present.shape[1]}]")
        if stream.dtype != present.dtype or stream.device != present.device:
            raise ValueError(
                f"pack: stream {m} is {stream.dtype} on {stream.device}, "
                f"expected {present.dtype} on {present.device} as the others"
            )
    return streams


def _check_packed(function: str, packed: Tensor, layout: PackedLayout) -> None:
    if packed.ndim != 2 or packed.shape[0] != layout.total_tokens:
        raise ValueError(f"{function}: packed has shape {list(packed.shape)}, expected [{layout.total_tokens}, E]")
    if packed.device != layout.device:
        raise ValueError(f"{function}: packed is on {packed.device}, the layout on {layout.device}")


def _check_out(out: Tensor, streams: list[Tensor], layout: PackedLayout) -> None:
    like = streams[0]
    shape = (layout.total_tokens, like.shape[1])
    if tuple(out.shape) != shape or out.dtype != like.dtype or out.device != like.device:
        raise ValueError(
            f"pack: out is {out.dtype} {list(out.shape)} on {out.device}, "
            f"expected {like.dtype} {list(shape)} on {like.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"pack: out has strides {list(out.stride())}, expected a contiguous tensor")
    if torch.is_grad_enabled() and (out.requires_grad or any(s.requires_grad for s in streams)):
        raise ValueError("pack: out= has no gradient; leave it out, or call under torch.no_grad()")


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

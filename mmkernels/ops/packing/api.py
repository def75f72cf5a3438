"""packing: what the user calls, with its checks.

T tokens, E width, B samples, L padded length, M modalities, N segments, N_m rows of modality m's stream, R rows to
gather.  Every operator takes `out`: contiguous memory to write into, apart from the inputs.  Warm memory saves the page
faults that cost more than the copy.  There is no gradient then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from mmkernels import arguments, dispatch, tracing
from mmkernels.layout import PackedLayout
from mmkernels.ops.packing import checks, op, quick
from mmkernels.packs import PackPlan, plan_packs

__all__ = ["PackPlan", "gather_rows", "pack", "pad", "plan_packs", "segment_mean", "unpack", "unpad"]

_QUICK = ("auto", "cpp")  # what `quick` may serve
MAX_LENGTH = 2**31 - 1  # positions are int32


def pack(
    streams: Sequence[Tensor | None], layout: PackedLayout, *, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Rows of all streams in the packed order: [T, E].  The inverse of `unpack`, which is also its gradient.

    streams  per modality [N_m, E], one width and dtype (any); None where the batch has no row of it.  Rows may lie
             apart (views of a wider tensor); the copy follows the layout's segment table
    out      as of every operator here: contiguous memory to write into, apart from the inputs.  No gradient then

    Raises ValueError for streams that do not fit the layout, for a layout with special tokens (their rows come from
    a token table: use modality_embed) and for one whose bounds only the device knows (it does not know its streams).
    """
    if impl in _QUICK and type(layout) is PackedLayout and not is_dynamo_compiling():
        table = layout.cache.get("quick_segments")  # of layouts on the CPU alone
        if table is not None and (packed := quick.pack(streams, table, out)) is not None:
            return packed
    segments = checks.segments("pack", layout)
    streams = checks.streams(streams, layout)
    like = streams[0]
    if out is not None:
        checks.out("pack", out, (layout.total_tokens, like.shape[1]), like, streams)
    where = (segments, layout.modality_ids, layout.source_rows)
    return op.pack(streams, *where, layout.total_tokens, _resolve("pack", impl, like), out=out)


def unpack(
    packed: Tensor, layout: PackedLayout, *, out: Sequence[Tensor] | None = None, impl: str = "auto"
) -> list[Tensor]:
    """The M streams [N_m, E] whose pack is packed [T, E], any dtype.  Errors as `pack`."""
    if impl in _QUICK and type(layout) is PackedLayout and not is_dynamo_compiling():
        table = layout.cache.get("quick_segments")  # of layouts on the CPU alone
        if table is not None and (streams := quick.unpack(packed, table, out)) is not None:
            return streams
    segments = checks.segments("unpack", layout)
    checks.packed("unpack", packed, layout)
    lengths = list(layout.stream_lengths)
    if out is not None:
        out = checks.outs("unpack", out, [(rows, packed.shape[1]) for rows in lengths], packed)
    where = (segments, layout.modality_ids, layout.source_rows)
    return op.unpack(packed, *where, lengths, _resolve("unpack", impl, packed), out=out)


def pad(
    packed: Tensor,
    layout: PackedLayout,
    *,
    length: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(padded [B, L, E], mask bool [B, L]): each sample's rows of packed [T, E], any dtype, then zeros.

    length  L; the layout's max_seqlen where it is left out.  The mask is True at tokens
    out     (padded, mask)

    The inverse of `unpad`, which is also its gradient.  Needs only the samples' bounds: any layout will do.
    Raises ValueError for packed of another length and for a sample longer than L.
    """
    if _quick_takes(impl, layout):
        longest = layout.max_seqlen if length is None else length
        fits = type(longest) is int and longest <= MAX_LENGTH
        if fits and (padded := quick.pad(packed, layout.cu_seqlens, longest, out)) is not None:
            return padded
    checks.packed("pad", packed, layout)
    length = layout.max_seqlen if length is None else length
    if isinstance(length, Tensor | np.ndarray) and length.ndim == 0:
        length = length.item()
    if not arguments.is_number(length, arguments.WHOLE) or not layout.max_seqlen <= length <= MAX_LENGTH:
        raise ValueError(
            f"pad: length is {length!r}, expected a whole number from {layout.max_seqlen}, the longest sample's, to "
            f"{MAX_LENGTH}"
        )
    if out is not None:
        out = checks.padded_out(out, (layout.num_samples, length, packed.shape[1]), packed)
    return op.pad(packed, layout.cu_seqlens, length, _resolve("pad", impl, packed), out=out)


def unpad(padded: Tensor, layout: PackedLayout, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """packed [T, E], the samples' rows of padded [B, L, E], any dtype and any L that holds them.

    What lies beyond a sample is not read; its gradient is zero.  No index tensor, no host synchronisation.
    Raises ValueError for padded of another shape.
    """
    if _quick_takes(impl, layout):
        packed = quick.unpad(padded, layout.cu_seqlens, layout.total_tokens, out)
        if packed is not None:
            return packed
    checks.padded(padded, layout)
    if out is not None:
        checks.out("unpad", out, (layout.total_tokens, padded.shape[2]), padded)
    return op.unpad(padded, layout.cu_seqlens, layout.total_tokens, _resolve("unpad", impl, padded), out=out)


def gather_rows(packed: Tensor, rows: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """packed[rows]: [R, E] from packed [T, E], any dtype, and rows [R], int32 or int64, in any order.

    The gradient sums the rows that repeat, in fp32 (fp64 for fp64), in the order of `rows`.
    Raises ValueError for a row outside [0, T) on CPU; on a GPU the range is the caller's promise.
    """
    if impl in _QUICK and type(packed) in tracing.PLAIN_TENSORS and packed.is_cpu and not is_dynamo_compiling():
        gathered = quick.gather_rows(packed, rows, out)
        if gathered is not None:
            return gathered
    checks.rows(packed, rows)
    if out is not None:
        checks.out("gather_rows", out, (rows.shape[0], packed.shape[1]), packed)
    return op.gather_rows(packed, rows, _resolve("gather_rows", impl, packed), out=out)


def segment_mean(packed: Tensor, layout: PackedLayout, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Mean of each segment's tokens (its special token included): [N, E] from packed [T, E]; 0 for an empty segment.

    Sums in fp32 (fp64 for fp64), in an order that depends on the segment alone.  Where only the device knows a layout's
    bounds, a segment is a sample.  Raises ValueError for packed of another length, a dtype that has no mean, and such a
    layout of several modalities, which does not know its segments.
    """
    if _quick_takes(impl, layout):
        means = quick.segment_mean(packed, layout.segment_cu_seqlens, out)
        if means is not None:
            return means
    checks.packed("segment_mean", packed, layout)
    if layout.segment_cu_seqlens is None:
        raise ValueError(
            "segment_mean: the layout comes from device-side bounds of several modalities and does not know its "
            "segments"
        )
    checks.summable("segment_mean", packed)
    if out is not None:
        checks.out("segment_mean", out, (layout.num_segments, packed.shape[1]), packed)
    return op.segment_mean(packed, layout.segment_cu_seqlens, _resolve("segment_mean", impl, packed), out=out)


def _quick_takes(impl: str, layout: PackedLayout) -> bool:
    """Whether `quick` may serve.  On a GPU it is not asked: a refusal takes as long as a launch."""
    return impl in _QUICK and type(layout) is PackedLayout and layout.cu_seqlens.is_cpu and not is_dynamo_compiling()


def _resolve(function: str, impl: str, tensor: Tensor) -> str:
    arguments.one_of(function, "impl", impl, dispatch.IMPLS)
    # The compiler would guard on what is not kept yet, and compile the next call anew.
    if is_dynamo_compiling():
        return dispatch.resolve("packing", impl, device=tensor.device, dtype=tensor.dtype)
    key = (impl, tensor.device.type, tensor.dtype)
    chosen = _RESOLVED.get(key)  # on a short batch looking it up anew would cost as much as the copy
    if chosen is None:
        chosen = _RESOLVED[key] = dispatch.resolve("packing", impl, device=tensor.device, dtype=tensor.dtype)
    return chosen


_RESOLVED: dict[tuple, str] = {}

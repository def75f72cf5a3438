"""AttentionMask to intervals and bits, on the host.   Tq queries, Tk keys, B samples, M modalities.

`tables` is the definition in O(T) numpy; mask_lowering_device computes the same from device-side bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmkernels import arguments
from mmkernels.layout import PackedLayout


def tables(layout: PackedLayout, k_layout: PackedLayout, mask) -> tuple[np.ndarray, np.ndarray]:
    """int32 [4, Tq]: kv_lo, kv_hi, q_bits, q_modality; int32 [4, Tk]: q_lo, q_hi, k_bits, k_modality."""
    q_table = np.empty((4, layout.total_tokens), np.int32)
    k_table = np.empty((4, k_layout.total_tokens), np.int32)
    lo, hi = q_table[0], q_table[1] = _intervals(layout, k_layout, mask)
    # Both bounds are monotone, so the queries with kv_lo <= j < kv_hi are an interval, and counting finds its ends.
    q_hi = _at_most(lo, k_layout.total_tokens)  # first query whose kv_lo > j
    np.minimum(_at_most(hi, k_layout.total_tokens), q_hi, out=k_table[0])  # first query whose kv_hi > j
    k_table[1] = q_hi
    q_modality, k_modality = layout.modality_ids.numpy(), k_layout.modality_ids.numpy()
    q_table[2] = visible_bits(mask, layout.num_modalities, k_layout.num_modalities).view(np.int32)[q_modality]
    q_table[3], k_table[3] = q_modality, k_modality
    np.left_shift(1, k_table[3], out=k_table[2])
    return q_table, k_table


def joined(tiles: np.ndarray, spans: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The same tiles, where those of at most `most` columns that follow one another walk them as one masked span.

    tiles int32 [N, 4], spans int32 [S, 3] as of TileSchedule.  A kernel fills its pipeline anew for each span, which a
    short tile feels more than a mask.
    """
    if not len(spans):
        return tiles, spans
    first, last = tiles[:, 2].astype(np.int64), tiles[:, 3].astype(np.int64) - 1
    # Before each span, where columns are left out.
    breaks = np.concatenate([[0], np.cumsum(spans[1:, 0] != spans[:-1, 1])])
    several = np.flatnonzero(last > first)
    first, last = first[several], last[several]
    fits = (breaks[first] == breaks[last]) & (spans[last, 1] - spans[first, 0] <= most)
    several, first, last = several[fits], first[fits], last[fits]
    spans, kept = spans.copy(), np.ones(len(spans) + 1, bool)
    spans[first, 1], spans[first, 2] = spans[last, 1], 1
    ends = np.zeros(len(spans) + 1, np.int64)
    np.add.at(ends, first + 1, 1)
    np.add.at(ends, last + 1, -1)
    kept[np.cumsum(ends) > 0] = False
    place = np.cumsum(kept) - 1  # of each span that is kept
    tiles, lengths = tiles.copy(), tiles[:, 3] - tiles[:, 2]
    lengths[several] = 1
    tiles[:, 2] = place[tiles[:, 2]]
    tiles[:, 3] = tiles[:, 2] + lengths
    return tiles, spans[kept[:-1]]


def _at_most(bounds: np.ndarray, num_keys: int) -> np.ndarray:
    """For each key j, how many of the bounds are at most j."""
    return np.bincount(bounds, minlength=num_keys + 1)[:num_keys].cumsum(dtype=np.int32)


def count_pairs(q_table: np.ndarray, k_table: np.ndarray, num_modalities: int, has_visible: bool) -> int:
    """Visible query-key pairs."""
    lo, hi, q_bits, _ = q_table
    if not has_visible:
        return int((hi.astype(np.int64) - lo).sum())
    total = 0
    for m in range(num_modalities):
        bit = np.uint32(1 << m)
        seen = np.concatenate(([0], np.cumsum(k_table[3] == m)))  # keys of m before each token
        rows = (q_bits.view(np.uint32) & bit) != 0
        total += int((seen[hi[rows]] - seen[lo[rows]]).sum())
    return total


def check_cross(layout: PackedLayout, k_layout: PackedLayout, mask) -> None:
    """Raises where queries and keys of two layouts cannot be put together."""
    if layout.num_samples != k_layout.num_samples:
        raise ValueError(
            f"attention: k_layout has {k_layout.num_samples} samples, expected layout's {layout.num_samples}"
        )
    if layout.device != k_layout.device:
        raise ValueError(f"attention: k_layout is on {k_layout.device}, expected layout's {layout.device}")
    for name, value in (("prefix", mask.prefix), ("bidirectional", mask.bidirectional)):
        if value:
            raise ValueError(
                f"AttentionMask: {name} has no meaning in cross-attention, where queries and keys are not the same "
                "tokens; leave it out, or use dense attention with this mask"
            )


def visible_bits(mask, num_modalities: int, num_key_modalities: int) -> np.ndarray:
    """uint32 [M]: the set of key modalities that each query modality sees."""
    everything = (1 << num_key_modalities) - 1
    if mask.visible is None:
        return np.full(num_modalities, everything, np.uint32)
    if len(mask.visible) != num_modalities or any(len(row) != num_key_modalities for row in mask.visible):
        raise ValueError(
            f"AttentionMask: visible has rows of {[len(row) for row in mask.visible]}, expected "
            f"[{num_modalities}, {num_key_modalities}] for the modalities of queries and keys"
        )
    return np.array([sum(1 << k for k, seen in enumerate(row) if seen) for row in mask.visible], np.uint32)


def check_bidirectional(mask, num_modalities: int) -> None:
    for m in mask.bidirectional:
        if not 0 <= m < num_modalities:
            raise ValueError(f"AttentionMask: bidirectional names modality {m}, the layout has {num_modalities}")


def prefix_lengths(prefix: Sequence[int], num_samples: int) -> np.ndarray:
    if len(prefix) != num_samples or min(prefix, default=0) < 0:
        raise ValueError(f"AttentionMask: prefix is {prefix}, expected {num_samples} lengths >= 0, one per sample")
    return np.array(prefix, np.int64)


def refuse_gap(begins: str = "begins") -> None:
    raise NotImplementedError(
        f"AttentionMask: some query's window of scope 'causal' {begins} beyond its sample's prefix, and one interval "
        "per query cannot leave out the gap between; use window_scope='all', or dense attention with this mask"
    )


def host_interval(name: str, value, num_queries: int, num_keys: int) -> np.ndarray:
    """int64 [Tq]: a bound that is not on a device, cut to what there are of keys."""
    array = arguments.host_array("AttentionMask", f"intervals.{name}", value, "biufc")
    if array.shape != (num_queries,) or array.dtype.kind not in "iu":
        refuse_interval(name, array, num_queries)
    return np.clip(array, 0, num_keys).astype(np.int64)  # who means "unlimited" may say what int64 cannot add to


def refuse_interval(name: str, bound, num_queries: int) -> None:
    raise ValueError(
        f"AttentionMask: intervals.{name} is {bound.dtype} {tuple(bound.shape)}, expected whole numbers [{num_queries}]"
    )


def _intervals(layout: PackedLayout, k_layout: PackedLayout, mask) -> tuple[np.ndarray, np.ndarray]:
    """kv_lo and kv_hi [Tq] of the mask without its modality visibility."""
    cu_q, cu_k = layout.cu_seqlens.numpy().astype(np.int64), k_layout.cu_seqlens.numpy().astype(np.int64)
    sample = np.arange(layout.num_samples).repeat(cu_q[1:] - cu_q[:-1])
    start, stop = cu_k[:-1].take(sample), cu_k[1:].take(sample)
    own = np.arange(layout.total_tokens)  # where the query stands among the keys
    if k_layout is not layout:
        own += (cu_k[1:] - cu_q[1:] if mask.align == "bottom_right" else cu_k[:-1] - cu_q[:-1])[sample]
    left, right = mask.window
    lo, hi = start, stop
    if mask.causal:
        segment_lo, segment_hi, prefix_hi = own, own + 1, start
        if mask.bidirectional:
            check_bidirectional(mask, layout.num_modalities)
            chosen = np.zeros(layout.num_modalities, bool)
            chosen[list(mask.bidirectional)] = True
            whole = chosen[layout.modality_ids.numpy()]
            bounds = layout.segment_cu_seqlens.numpy().astype(np.int64)
            segment = layout.segment_ids.numpy()
            segment_lo = np.where(whole, bounds[:-1][segment], segment_lo)
            segment_hi = np.where(whole, bounds[1:][segment], segment_hi)
        if mask.prefix is not None:
            prefix_hi = start + prefix_lengths(mask.prefix, layout.num_samples)[sample]
        hi = np.maximum(np.maximum(own + 1, segment_hi), prefix_hi)
        if mask.window_scope == "causal":
            if left >= 0:
                window_lo = np.minimum(own - left, segment_lo)
                has_prefix = prefix_hi > start
                if (has_prefix & (window_lo > prefix_hi)).any():
                    refuse_gap()
                lo = np.where(has_prefix, start, np.maximum(lo, window_lo))
            left = right = -1
    if left >= 0:
        lo = np.maximum(lo, own - left)
    if right >= 0:
        hi = np.minimum(hi, own + right + 1)
    if mask.intervals is not None:
        given_lo, given_hi = _given(mask.intervals, layout, k_layout)
        lo, hi = np.maximum(lo, start + given_lo), np.minimum(hi, start + given_hi)
    lo = np.minimum(np.maximum(lo, start), stop)  # np.clip takes three times as long
    return lo, np.minimum(np.maximum(hi, lo), stop)


def _given(intervals, layout: PackedLayout, k_layout: PackedLayout) -> tuple[np.ndarray, np.ndarray]:
    bounds = []
    first = layout.cu_seqlens.numpy()[:-1]
    for name, value in (("lo", intervals.lo), ("hi", intervals.hi)):
        array = host_interval(name, value, layout.total_tokens, k_layout.total_tokens)
        falls = np.diff(array, prepend=0) < 0
        falls[first[first < len(falls)]] = False  # another sample begins
        if falls.any():
            raise ValueError(
                f"AttentionMask: intervals.{name} falls at query {int(np.argmax(falls))}, expected bounds that never "
                "decrease within a sample"
            )
        bounds.append(array)
    return bounds[0], bounds[1]

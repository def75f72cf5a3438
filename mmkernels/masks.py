"""AttentionMask (what may be seen) and MaskPlan (intervals and modality bits, which the kernels read).

T tokens, B samples, M modalities.  Query i sees key j when j lies in [kv_lo[i], kv_hi[i]) and the modality of j is in
the set that the modality of i may see.  Both bounds are non-decreasing in i, so the queries that see a key are an
interval too, [q_lo[j], q_hi[j]), and backward has bounds as exact as forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels import planner
from mmkernels.layout import PackedLayout


@dataclass(frozen=True)
class AttentionMask:
    """What a query may see.  Key j is visible to query i iff both are in the same sample, and

        (not causal, or j <= i, or j < prefix[sample], or i and j share a bidirectional segment)
        and i - window[0] <= j <= i + window[1]          (a negative side is unlimited)
        and visible[modality(i)][modality(j)].

    window         flash-attention's (left, right), in tokens of the sample
    window_scope   "all": the window limits everything; "causal": prefix and bidirectional keys stay visible beyond it
    prefix         tokens per sample that are seen by all of it, length B
    bidirectional  modalities whose segments see themselves whole under a causal mask
    visible        bool [M, M], query modality by key modality; None: all see all
    """

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    window_scope: str = "all"
    prefix: tuple[int, ...] | None = None
    bidirectional: tuple[int, ...] = ()
    visible: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.window_scope not in ("all", "causal"):
            raise ValueError(f"AttentionMask: window_scope is {self.window_scope!r}, expected 'all' or 'causal'")
        # Tensors, arrays and lists become tuples, so that equal masks are equal and hash alike.
        window = _whole_numbers("window", self.window, "(left, right)")
        if len(window) != 2:
            raise ValueError(f"AttentionMask: window is {self.window!r}, expected (left, right)")
        object.__setattr__(self, "window", window)
        bidirectional = _whole_numbers("bidirectional", self.bidirectional, "modalities")
        object.__setattr__(self, "bidirectional", bidirectional)
        if self.prefix is not None:
            object.__setattr__(self, "prefix", _whole_numbers("prefix", self.prefix, "lengths, one per sample"))
        if (self.prefix is not None or self.bidirectional) and not self.causal:
            raise ValueError("AttentionMask: prefix and bidirectional widen a causal mask; set causal=True")
        if self.visible is not None:
            object.__setattr__(self, "visible", _table_of_bools(self.visible))

    @classmethod
    def isolated(cls, num_modalities: int) -> AttentionMask:
        """Each modality sees itself alone: as many unimodal encoders in one pass."""
        return cls(visible=tuple(tuple(q == k for k in range(num_modalities)) for q in range(num_modalities)))


@dataclass(frozen=True)
class TileSchedule:
    """Per-sample tiles of one block shape, heaviest first.

    tiles  int32 [n, 4]  row start, row end (all of one sample), first span, last span (exclusive)
    spans  int32 [m, 3]  column start, column end, masked; whole blocks from the sample's start, clipped at its end.
                         masked = 0: every row sees every column and every block is whole
    pairs  query-key pairs that the tiles compute
    """

    tiles: Tensor
    spans: Tensor
    pairs: int


class MaskPlan:
    """A mask lowered on a layout: O(T) bounds and bits, and the tiles of any block shape.  Build with `lower`."""

    layout: PackedLayout
    mask: AttentionMask
    table: Tensor  # int32 [6, T]: its rows are the six below
    kv_lo: Tensor  # int32 [T]
    kv_hi: Tensor
    q_lo: Tensor
    q_hi: Tensor
    q_bits: Tensor  # int32 [T]: modalities that the query sees
    k_bits: Tensor  # int32 [T]: the key's modality, one bit

    @classmethod
    def lower(cls, layout: PackedLayout, mask: AttentionMask | None = None) -> MaskPlan:
        """Lower `mask` (None: all of the sample is visible) on `layout`, once: the plan is kept on the layout.

        Raises ValueError for a mask that does not fit the layout, NotImplementedError for one that intervals and bits
        cannot express, with the dense alternative.
        """
        mask = mask or AttentionMask()
        plan = layout.cache.get(mask)
        if plan is None:
            if torch.compiler.is_compiling():
                # Host code that Dynamo cannot trace.  Lowering as an op of its own comes with issue 3.
                raise RuntimeError(
                    "MaskPlan: inside torch.compile the layout must have met this mask before; call attention on it "
                    "once outside"
                )
            plan = layout.cache[mask] = cls(layout, mask)
        return plan

    def __init__(self, layout: PackedLayout, mask: AttentionMask) -> None:
        self.layout, self.mask = layout, mask
        self.has_visible = mask.visible is not None
        self.cache: dict[Any, Any] = {}  # what operators derive from the plan
        self._tiles: dict[tuple[str, int, int], TileSchedule] = {}
        self._visible_pairs: int | None = None
        host = layout.host
        if host is None:
            raise NotImplementedError(
                "MaskPlan: the layout has only device-side bounds (from_cu_seqlens); lowering these comes in issue 3; "
                "build the layout from host lengths"
            )
        if host is not layout:
            self._host_plan = MaskPlan.lower(host, mask)
            table = self._host_plan.table.to(layout.device, non_blocking=True)
        else:
            self._host_plan = self
            table = torch.from_numpy(_lower(layout, mask))
        self.table = table
        self.kv_lo, self.kv_hi, self.q_lo, self.q_hi, self.q_bits, self.k_bits = table.unbind(0)

    def tiles(self, rows: str, block_rows: int, block_cols: int) -> TileSchedule:
        """Tiles with queries as rows (forward, dQ) or keys as rows (dK, dV).  rows is "query" or "key"."""
        if rows not in ("query", "key"):
            raise ValueError(f"MaskPlan.tiles: rows is {rows!r}, expected 'query' or 'key'")
        key = (rows, block_rows, block_cols)
        schedule = self._tiles.get(key)
        if schedule is None:
            schedule = self._tiles[key] = self._schedule(*key)
        return schedule

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs that are visible: what FLOPs are counted on."""
        if self._host_plan is not self:
            return self._host_plan.visible_pairs
        if self._visible_pairs is None:
            self._visible_pairs = _count_pairs(self.table.numpy(), self.layout.num_modalities, self.has_visible)
        return self._visible_pairs

    def _schedule(self, rows: str, block_rows: int, block_cols: int) -> TileSchedule:
        if self._host_plan is not self:
            host = self._host_plan.tiles(rows, block_rows, block_cols)
            device = self.layout.device
            return TileSchedule(
                host.tiles.to(device, non_blocking=True), host.spans.to(device, non_blocking=True), host.pairs
            )
        kv_lo, kv_hi, q_lo, q_hi, q_bits, k_bits = self.table.numpy()
        if rows == "query":
            bounds = (kv_lo, kv_hi, q_bits, k_bits)
        else:
            bounds = (q_lo, q_hi, k_bits, q_bits)
        tiles, spans, pairs = planner.attention_tiles(
            self.layout.cu_seqlens.numpy(), *bounds, block_rows, block_cols, rows=rows
        )
        return TileSchedule(torch.from_numpy(tiles), torch.from_numpy(spans), pairs)


def _lower(layout: PackedLayout, mask: AttentionMask) -> np.ndarray:
    """int32 [6, T]: kv_lo, kv_hi, q_lo, q_hi, q_bits, k_bits."""
    T = layout.total_tokens
    table = np.empty((6, T), np.int32)
    cu_seqlens = layout.cu_seqlens.numpy()
    lengths = np.diff(cu_seqlens)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    start = cu_seqlens[:-1].astype(np.int64)[sample]
    stop = cu_seqlens[1:].astype(np.int64)[sample]
    lo, hi = _intervals(layout, mask, sample, start, stop)
    table[0], table[1] = lo, hi
    # Both bounds are monotone, so the queries with kv_lo <= j < kv_hi are an interval: searchsorted finds its ends.
    keys = np.arange(T)
    q_hi = np.searchsorted(table[0], keys, side="right")  # first query whose kv_lo > j
    q_lo = np.minimum(np.searchsorted(table[1], keys, side="right"), q_hi)  # first query whose kv_hi > j
    table[2], table[3] = q_lo, q_hi
    modality = layout.modality_ids.numpy()
    visible = _visible_bits(mask, layout.num_modalities)
    table[4] = visible[modality].view(np.int32)
    table[5] = (np.uint32(1) << modality.astype(np.uint32)).view(np.int32)
    return table


def _intervals(layout, mask, sample, start, stop) -> tuple[np.ndarray, np.ndarray]:
    """kv_lo and kv_hi [T] of the mask without its modality visibility."""
    token = np.arange(layout.total_tokens, dtype=np.int64)
    left, right = mask.window
    if not mask.causal:
        lo = start if left < 0 else np.maximum(start, token - left)
        hi = stop if right < 0 else np.minimum(stop, token + right + 1)
        return lo, np.maximum(lo, hi)
    segment_lo, segment_hi = token, token + 1
    if mask.bidirectional:
        own = _bidirectional_rows(layout, mask.bidirectional)
        bounds = layout.segment_cu_seqlens.numpy().astype(np.int64)
        segment = layout.segment_ids.numpy()
        segment_lo = np.where(own, bounds[:-1][segment], segment_lo)
        segment_hi = np.where(own, bounds[1:][segment], segment_hi)
    prefix_hi = start
    if mask.prefix is not None:
        prefix_hi = np.minimum(start + _prefix(mask.prefix, layout.num_samples)[sample], stop)
    lo, hi = start, np.maximum(np.maximum(token + 1, segment_hi), prefix_hi)
    if mask.window_scope == "all":
        if left >= 0:
            lo = np.maximum(lo, token - left)
        if right >= 0:
            hi = np.minimum(hi, token + right + 1)
        return lo, np.maximum(lo, hi)
    if left >= 0:
        if (prefix_hi > start).any():
            raise NotImplementedError(
                "AttentionMask: prefix with a left window of scope 'causal' leaves a gap between prefix and window, "
                "which one interval per query cannot hold; use window_scope='all', or dense attention with this mask"
            )
        lo = np.maximum(lo, np.minimum(token - left, segment_lo))
    return lo, hi


def _bidirectional_rows(layout: PackedLayout, modalities: Sequence[int]) -> np.ndarray:
    for m in modalities:
        if not 0 <= m < layout.num_modalities:
            raise ValueError(f"AttentionMask: bidirectional names modality {m}, the layout has {layout.num_modalities}")
    return np.isin(layout.modality_ids.numpy(), modalities)


def _prefix(prefix: Sequence[int], num_samples: int) -> np.ndarray:
    if len(prefix) != num_samples or min(prefix, default=0) < 0:
        raise ValueError(f"AttentionMask: prefix is {prefix}, expected {num_samples} lengths >= 0, one per sample")
    return np.array(prefix, np.int64)


def _visible_bits(mask: AttentionMask, num_modalities: int) -> np.ndarray:
    """uint32 [M]: the set of modalities that each modality sees."""
    everything = (1 << num_modalities) - 1
    if mask.visible is None:
        return np.full(num_modalities, everything, np.uint32)
    if len(mask.visible) != num_modalities or any(len(row) != num_modalities for row in mask.visible):
        raise ValueError(
            f"AttentionMask: visible has rows of {[len(row) for row in mask.visible]}, expected "
            f"[{num_modalities}, {num_modalities}] for the layout's modalities"
        )
    return np.array([sum(1 << k for k, seen in enumerate(row) if seen) for row in mask.visible], np.uint32)


def _count_pairs(table: np.ndarray, num_modalities: int, has_visible: bool) -> int:
    lo, hi, _, _, q_bits, k_bits = table
    if not has_visible:
        return int((hi.astype(np.int64) - lo).sum())
    total = 0
    for m in range(num_modalities):
        bit = np.uint32(1 << m)
        seen = np.concatenate(([0], np.cumsum((k_bits.view(np.uint32) & bit) != 0)))  # keys of m before each token
        rows = (q_bits.view(np.uint32) & bit) != 0
        total += int((seen[hi[rows]] - seen[lo[rows]]).sum())
    return total


def _whole_numbers(name: str, values, expected: str) -> tuple[int, ...]:
    try:
        return tuple(index(value) for value in _listed(values))
    except TypeError:  # not a sequence, or 2.5: never rounded to 2
        raise ValueError(f"AttentionMask: {name} is {values!r}, expected {expected} as integers") from None


def _table_of_bools(visible) -> tuple[tuple[bool, ...], ...]:
    try:
        return tuple(tuple(bool(v) for v in row) for row in _listed(visible))
    except TypeError:
        raise ValueError(f"AttentionMask: visible is {visible!r}, expected bool [M, M]") from None


def _listed(values):
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values

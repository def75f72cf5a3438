"""AttentionMask (what may be seen) and MaskPlan (intervals and modality bits, which the kernels read).

Tq queries, Tk keys, B samples, M modalities.  Query i sees key j when j lies in [kv_lo[i], kv_hi[i]) and the modality
of j is in the set that the modality of i may see.  Both bounds are non-decreasing in i, so the queries that see a key
are an interval too, [q_lo[j], q_hi[j]), and backward has bounds as exact as forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels import devices, layout_tables, locks, mask_lowering, mask_lowering_device, planner, tracing
from mmkernels.arguments import one_of, zero_or_one
from mmkernels.layout import PackedLayout

ALIGN = ("bottom_right", "top_left")
SCHEDULES = ("sample", "token")
FAR = 2**31 - 1  # no sample is longer: more is said by people who mean "unlimited", and int64 would overflow
MOST_PLANS = 64  # of different masks that a layout keeps: a model's layers ask for a few
MOST_KEY_LAYOUTS = 16  # for each of which it keeps a mask's plan in cross-attention
_LOWERED_OUTSIDE = (
    "MaskPlan: in one graph the layout must have met this mask before; call mmkernels.prepare_attention, or attention "
    "itself, on it once outside"
)


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """Query i may see keys lo[i] <= j < hi[i], counted from the first key of its sample; none where lo[i] >= hi[i].

    lo, hi  whole numbers [Tq], numpy or tensors, each non-decreasing within a sample.  On a GPU they are lowered there
            and never read back, so that falling ones pass.  Compared by identity: keep one object for one batch
    """

    lo: Any
    hi: Any

    @property
    def on_device(self) -> bool:
        return any(isinstance(bound, Tensor) and bound.device.type != "cpu" for bound in (self.lo, self.hi))


@dataclass(frozen=True)
class AttentionMask:
    """What a query may see.  Key j is visible to query i iff both are in the same sample, and

        (not causal, or j <= i, or j < prefix[sample], or i and j share a bidirectional segment)
        and i - window[0] <= j <= i + window[1]          (a negative side is unlimited)
        and intervals.lo[i] <= j < intervals.hi[i]       (where given)
        and visible[modality(i)][modality(j)].

    window         flash-attention's (left, right), in tokens of the sample
    window_scope   "all": the window limits everything; "causal": prefix and bidirectional keys stay visible beyond it
    prefix         tokens per sample that are seen by all of it, length B; with causal alone
    bidirectional  modalities whose segments see themselves whole; with causal alone
    visible        bool [M, M], query modality by key modality; None: all see all
    align          cross-attention only: where query i stands among the keys for causal and window.  "bottom_right": the
                   last query at the last key, as in flash-attention; "top_left": the first at the first
    intervals      KeyIntervals: any further bounds, such as a padding mask's

    Raises ValueError naming the field that is none of this; what does not fit a batch, MaskPlan.lower refuses.
    """

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    window_scope: str = "all"
    prefix: Sequence[int] | np.ndarray | Tensor | None = None
    bidirectional: Sequence[int] | np.ndarray | Tensor = ()
    visible: Sequence[Sequence[bool]] | np.ndarray | Tensor | None = None
    align: str = "bottom_right"
    intervals: KeyIntervals | None = None

    def __post_init__(self) -> None:
        one_of("AttentionMask", "align", self.align, ALIGN)
        one_of("AttentionMask", "window_scope", self.window_scope, ("all", "causal"))
        if (causal := zero_or_one(self.causal)) is None:
            raise ValueError(f"AttentionMask: causal is {self.causal!r}, expected a bool")
        object.__setattr__(self, "causal", causal)
        # Tensors, arrays and lists become tuples, so that equal masks are equal and hash alike.
        window = _whole_numbers("window", self.window, "(left, right)")
        if len(window) != 2:
            raise ValueError(f"AttentionMask: window is {self.window!r}, expected (left, right)")
        object.__setattr__(self, "window", tuple(min(side, FAR) for side in window))
        bidirectional = _whole_numbers("bidirectional", self.bidirectional, "modalities")
        object.__setattr__(self, "bidirectional", bidirectional)
        if self.prefix is not None:
            prefix = _whole_numbers("prefix", self.prefix, "lengths, one per sample")
            object.__setattr__(self, "prefix", tuple(min(length, FAR) for length in prefix))
        if (self.prefix is not None or self.bidirectional) and not self.causal:
            raise ValueError("AttentionMask: prefix and bidirectional widen a causal mask; set causal=True")
        if self.visible is not None:
            object.__setattr__(self, "visible", _table_of_bools(self.visible))
        if not isinstance(self.intervals, KeyIntervals | None):
            raise ValueError(f"AttentionMask: intervals is {type(self.intervals).__name__}, expected KeyIntervals")

    @classmethod
    def isolated(cls, num_modalities: int) -> AttentionMask:
        """Each modality sees itself alone: as many unimodal encoders in one pass.  ValueError beyond 1 to 32."""
        layout_tables.check_modalities("AttentionMask.isolated", num_modalities)
        return cls(visible=tuple(tuple(q == k for k in range(num_modalities)) for q in range(num_modalities)))


@dataclass(frozen=True)
class TileSchedule:
    """Tiles of one block shape.  From host lengths: samples by their heaviest tile, in each the heaviest tile first.

    tiles  int32 [n, 4]  row start, row end, first span, last span (exclusive)
    spans  int32 [m, 3]  column start, column end, masked; whole blocks, clipped at the end.  masked = 0: every row sees
                         every column and every block is whole
    pairs  query-key pairs that the tiles compute; None where only device-side bounds are known

    Schedule "sample": the rows of a tile are of one sample, blocks count from the sample's first column, and columns of
    other samples are never read.  "token": rows and blocks count from the first token, whatever sample they are in.
    """

    tiles: Tensor
    spans: Tensor
    pairs: int | None


class MaskPlan:
    """A mask lowered on a layout: O(T) bounds and bits, and the tiles of any block shape.  Build with `lower`."""

    layout: PackedLayout
    k_layout: PackedLayout  # the same in self-attention
    mask: AttentionMask
    q_table: Tensor  # int32 [4, Tq]: its rows are kv_lo, kv_hi, q_bits, q_modality
    k_table: Tensor  # int32 [4, Tk]: its rows are q_lo, q_hi, k_bits, k_modality
    # Made when asked for: kernels take the tables whole, and eight views cost as much as a tenth of lowering.
    kv_lo = property(lambda self: self.q_table[0])  # int32 [Tq]
    kv_hi = property(lambda self: self.q_table[1])
    q_bits = property(lambda self: self.q_table[2])  # int32 [Tq]: modalities that the query sees
    q_modality = property(lambda self: self.q_table[3])
    q_lo = property(lambda self: self.k_table[0])  # int32 [Tk]
    q_hi = property(lambda self: self.k_table[1])
    k_bits = property(lambda self: self.k_table[2])  # int32 [Tk]: the key's modality, one bit
    k_modality = property(lambda self: self.k_table[3])

    @classmethod
    def lower(
        cls, layout: PackedLayout, mask: AttentionMask | None = None, k_layout: PackedLayout | None = None
    ) -> MaskPlan:
        """Lower `mask` (None: all of the sample is visible) on `layout`, once: the plan is kept on the layout.

        k_layout is the layout of the keys in cross-attention.  Raises ValueError for a mask that does not fit the
        layout, NotImplementedError for one that intervals and bits cannot express, with the dense alternative.
        """
        keys = layout if k_layout is None else k_layout
        if not (isinstance(layout, PackedLayout) and isinstance(mask, AttentionMask)):
            mask = _checked(layout, mask, keys)
        # Not a dictionary by (mask, keys): Dynamo cannot hash a layout, but it guards on `is`.
        plans = layout.cache.get(mask, ())
        for plan in plans:
            if (plan.k_layout if plan.is_cross else layout) is keys:
                return plan
        return _lowered_anew(layout, mask, keys)

    @tracing.host_code(_LOWERED_OUTSIDE)
    def __init__(
        self, layout: PackedLayout, mask: AttentionMask | None = None, k_layout: PackedLayout | None = None
    ) -> None:
        k_layout = layout if k_layout is None else k_layout
        mask = _checked(layout, mask, k_layout)
        self.is_cross = k_layout is not layout
        # Without the caches, of which one holds this plan: what holds itself stays until the cyclic collector runs, and
        # training loops turn that off.
        self.layout, self.mask = layout.without_caches(), mask
        self.k_layout = k_layout if self.is_cross else self.layout
        self.has_visible = mask.visible is not None
        self.cache: dict[Any, Any] = {}  # what operators derive from the plan
        self._tiles: dict[tuple[str, int, int, str, int], TileSchedule] = {}
        self._visible_pairs: int | None = None
        self._is_host = False
        self._of_host: MaskPlan | None = None
        for side in (layout, k_layout) if self.is_cross else (layout,):
            if side.segments is not None and side.device.type == "cpu":  # a field may have been written over
                for name in ("cu_seqlens", "segment_cu_seqlens"):
                    bounds = getattr(side, name).numpy(force=True)
                    layout_tables.check_bounds("MaskPlan", name, bounds, side.total_tokens, side.max_seqlen)
        if self.is_cross:
            mask_lowering.check_cross(layout, k_layout, mask)
        if layout.host is None or k_layout.host is None or (mask.intervals is not None and mask.intervals.on_device):
            # Only device-side bounds are known; nothing may wait for them.
            self.q_table, self.k_table = mask_lowering_device.tables(layout, k_layout, mask)
        elif layout.host is layout:
            self._is_host = True
            self.q_table, self.k_table = (torch.from_numpy(t) for t in mask_lowering.tables(layout, k_layout, mask))
        else:
            self._of_host = host = MaskPlan.lower(layout.host, mask, k_layout.host if self.is_cross else None)
            self.q_table, self.k_table = (_sent(t, layout.device) for t in (host.q_table, host.k_table))

    @property
    def _host_plan(self) -> MaskPlan | None:
        """The plan whose tables are numpy's to read; None where only device-side bounds are known."""
        return self if self._is_host else self._of_host

    @property
    def schedules(self) -> tuple[str, ...]:
        """The tile schedules that can be had: device-side bounds give token tiles only."""
        return SCHEDULES if self._host_plan is not None else ("token",)

    def tiles(
        self, rows: str, block_rows: int, block_cols: int, schedule: str = "sample", joined: int = 0
    ) -> TileSchedule:
        """Tiles with queries as rows (forward, dQ) or keys as rows (dK, dV).  rows is "query" or "key".

        joined: tiles of at most so many columns take adjacent spans as one masked span (host bounds only).
        Raises NotImplementedError for sample tiles where only device-side bounds are known.
        """
        one_of("MaskPlan.tiles", "rows", rows, ("query", "key"))
        one_of("MaskPlan.tiles", "schedule", schedule, SCHEDULES)
        key = (rows, block_rows, block_cols, schedule, joined)
        found = self._tiles.get(key)
        if found is None:
            found = self._tiles[key] = self._schedule(*key)
        return found

    def cost(self, schedule: str, block_rows: int, block_cols: int, rows: str = "query") -> int:
        """Query-key pairs that a schedule's tiles would compute; compare with `visible_pairs`."""
        counted = self if self._host_plan is None else self._host_plan  # tiles that are only counted stay on the host
        pairs = counted.tiles(rows, block_rows, block_cols, schedule).pairs
        if pairs is None:
            raise NotImplementedError("MaskPlan.cost: the layout has only device-side bounds; counting them would sync")
        return pairs

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs that are visible: what FLOPs are counted on."""
        if self._host_plan is None:
            raise NotImplementedError(
                "MaskPlan.visible_pairs: the layout has only device-side bounds; counting them would sync"
            )
        if self._host_plan is not self:
            return self._host_plan.visible_pairs
        if self._visible_pairs is None:
            self._visible_pairs = self._counted()
        return self._visible_pairs

    @tracing.host_code("MaskPlan.visible_pairs: in one graph they must have been asked for before, outside")
    def _counted(self) -> int:
        return mask_lowering.count_pairs(
            self.q_table.numpy(), self.k_table.numpy(), self.k_layout.num_modalities, self.has_visible
        )

    @tracing.host_code("MaskPlan.tiles: in one graph they must have been asked for before, outside")
    def _schedule(self, rows: str, block_rows: int, block_cols: int, schedule: str, joined: int) -> TileSchedule:
        if self._host_plan is None:
            if schedule == "sample":
                raise NotImplementedError(
                    "MaskPlan.tiles: the layout has only device-side bounds (from_cu_seqlens), which allow token tiles "
                    "only; build the layout from host lengths"
                )
            tables = (self.q_table, self.k_table) if rows == "query" else (self.k_table, self.q_table)
            tiles, spans = mask_lowering_device.token_tiles(
                *tables, block_rows, block_cols, rows=rows, has_visible=self.has_visible
            )
            return TileSchedule(tiles, spans, None)
        if self._host_plan is not self:
            host = self._host_plan.tiles(rows, block_rows, block_cols, schedule, joined)
            device = self.layout.device
            return TileSchedule(_sent(host.tiles, device), _sent(host.spans, device), host.pairs)
        if joined:
            apart = self.tiles(rows, block_rows, block_cols, schedule)
            tiles, spans = mask_lowering.joined(apart.tiles.numpy(), apart.spans.numpy(), joined)
            return TileSchedule(torch.from_numpy(tiles), torch.from_numpy(spans), apart.pairs)
        (lo, hi, row_bits, _), (_, _, col_bits, _) = self.q_table.numpy(), self.k_table.numpy()
        cu_rows, cu_cols = self.layout.cu_seqlens.numpy(), self.k_layout.cu_seqlens.numpy()
        if rows == "key":
            (lo, hi, row_bits, _), (_, _, col_bits, _) = self.k_table.numpy(), self.q_table.numpy()
            cu_rows, cu_cols = cu_cols, cu_rows
        if schedule == "token":  # as if the batch were one sample: the bounds keep the real ones apart
            cu_rows, cu_cols = np.array([0, len(lo)], np.int32), np.array([0, len(col_bits)], np.int32)
        tiles, spans, pairs = planner.attention_tiles(
            cu_rows, cu_cols, lo, hi, row_bits, col_bits, block_rows, block_cols, rows=rows
        )
        return TileSchedule(torch.from_numpy(tiles), torch.from_numpy(spans), pairs)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    return devices.sent("MaskPlan: the tables of a mask", table, device)


@tracing.host_code(_LOWERED_OUTSIDE)
def _lowered_anew(layout: PackedLayout, mask: AttentionMask, keys: PackedLayout) -> MaskPlan:
    with torch._C._DisableFuncTorch():  # under torch.func a new tensor has no data that numpy could read
        plan = MaskPlan(layout, mask, keys)
    with _keeping:
        _keep(layout.cache, mask, plan)
    return plan


def _checked(layout, mask, keys) -> AttentionMask:
    """The mask, which is never None; ValueError for what is of another type."""
    mask = _EVERYTHING if mask is None else mask
    for name, value in (("layout", layout), ("k_layout", keys)):
        if not isinstance(value, PackedLayout):
            raise ValueError(f"MaskPlan: {name} is {type(value).__name__}, expected PackedLayout")
    if not isinstance(mask, AttentionMask):
        raise ValueError(f"MaskPlan: mask is {type(mask).__name__}, expected AttentionMask or None")
    return mask


_keeping = locks.across_forks()  # threads may share a layout; lowering itself goes on beside


def _keep(cache: dict, mask: AttentionMask, plan: MaskPlan) -> None:
    """A mask that is new in every step must not fill the memory of a layout that stays."""
    if mask not in cache:
        # list(): one step, while operators put other things in without the lock.
        met = [key for key in list(cache) if isinstance(key, AttentionMask)]
        for oldest in met[: max(0, len(met) + 1 - MOST_PLANS)]:
            del cache[oldest]
    cache[mask] = (*cache.get(mask, ()), plan)[-MOST_KEY_LAYOUTS:]


def _whole_numbers(name: str, values, expected: str) -> tuple[int, ...]:
    try:
        return tuple(index(value) for value in _listed(values))
    except TypeError:  # not a sequence, or 2.5: never rounded to 2
        raise ValueError(f"AttentionMask: {name} is {values!r}, expected {expected} as integers") from None


def _table_of_bools(visible) -> tuple[tuple[bool, ...], ...]:
    """Of bools or 0 and 1 alone: an additive mask of 0 and -inf would come out as its opposite."""
    try:
        table = tuple(tuple(zero_or_one(v) for v in row) for row in _listed(visible))
    except TypeError:
        table = ((None,),)
    if any(v is None for row in table for v in row):
        raise ValueError(f"AttentionMask: visible is {visible!r}, expected bool [M, M]")
    return table


def _listed(values):
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values


_EVERYTHING = AttentionMask()  # of the sample


if __name__ == "__main__":
    from mmkernels.mask_command import main

    raise SystemExit(main())

"""Host-side planning: layouts, attention tiles, packs. numpy in, numpy out, no torch.

C++ (`mmkernels._planner`, csrc/planner) where it is built, else planner_numpy.py; both give equal arrays.
B samples, N segments, T tokens, A position axes, M modalities; n items, K budgets
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmkernels import planner_numpy

try:
    from mmkernels import _planner
except ImportError:  # no compiler at install time; `python -m mmkernels.build` builds it later
    _planner = None

BACKEND = "cpp" if _planner is not None else "numpy"
_backend = _planner if _planner is not None else planner_numpy

POLICIES = ("best_fit", "first_fit", "stream")
LONG = ("error", "split", "drop")

layout_sections = planner_numpy.layout_sections


def build_layout(segments, grids, special_ids, num_samples: int, axes: int) -> np.ndarray:
    """All arrays of a packed layout in one int32 buffer, so that they cross to a device in one copy.

    segments [N, 4]: sample, modality, length in tokens (with the special token), first source row; in sample order.
    grids [N, 3]: (0, 0, length), (0, rows, columns) or (time, rows, columns) of a segment without its special token.
    special_ids [M]: id of the token in front of each non-empty segment of a modality, -1 for none.

    Sections, at `layout_sections(num_samples, N, T, axes)`: cu_seqlens [B+1], positions [A, T], segment_ids [T],
    source_rows [T] (-(id + 1) at a special token), segment_cu_seqlens [N+1], modality_ids [T] as bytes.
    Raises ValueError naming the segment that is wrong, or when T passes int32.
    """
    segments = _int32("build_layout", "segments", segments, 4)
    grids = _int32("build_layout", "grids", grids, 3)
    special_ids = _int32("build_layout", "special_ids", special_ids)
    if len(grids) != len(segments):
        raise ValueError(f"build_layout: grids has {len(grids)} rows, expected {len(segments)} as in segments")
    if not 1 <= len(special_ids) <= 256:
        raise ValueError(f"build_layout: special_ids has {len(special_ids)} modalities, expected 1 to 256")
    if num_samples < 0 or axes < 1:
        raise ValueError(f"build_layout: num_samples is {num_samples} and axes {axes}, expected >= 0 and >= 1")
    return _backend.build_layout(segments, grids, special_ids, num_samples, axes)


def attention_tiles(
    cu_rows, cu_cols, lo, hi, row_bits, col_bits, block_rows: int, block_cols: int, *, rows: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tiles of `block_rows` rows of one sample and, for each, the spans of column blocks that some row sees.

    Row i sees column j when lo[i] <= j < hi[i] (both non-decreasing within a sample) and row_bits[i] & col_bits[j].
    rows="query": rows are queries and columns keys; rows="key": the transpose, for backward. Keys carry one bit.
    cu_rows, cu_cols [B + 1]: bounds of the samples; one sample [0, R], [0, C] gives tiles that cross real samples.

    tiles int32 [n, 4]: row_start, row_end, first span, last span (exclusive); most blocks first, stable.
    spans int32 [m, 3]: col_start, col_end, masked. Blocks count from the sample's start and are clipped at its end.
      masked = 0: every row sees every column and every block is whole. A short tile of keys has masked spans only.
    pairs: block_rows * block_cols * blocks visited.
    Raises ValueError where bounds decrease or a key has not exactly one bit.
    """
    if rows not in ("query", "key"):
        raise ValueError(f'attention_tiles: rows is {rows!r}, expected "query" or "key"')
    arrays = {"cu_rows": cu_rows, "cu_cols": cu_cols, "lo": lo, "hi": hi, "row_bits": row_bits, "col_bits": col_bits}
    arrays = {name: _int32("attention_tiles", name, array) for name, array in arrays.items()}
    for name in ("hi", "row_bits"):
        if len(arrays[name]) != len(arrays["lo"]):
            raise ValueError(
                f"attention_tiles: {name} has {len(arrays[name])} tokens, expected {len(arrays['lo'])} as lo"
            )
    if len(arrays["cu_rows"]) == 0 or len(arrays["cu_rows"]) != len(arrays["cu_cols"]):
        raise ValueError(
            f"attention_tiles: cu_rows has {len(arrays['cu_rows'])} and cu_cols {len(arrays['cu_cols'])} bounds, "
            "expected B + 1 both"
        )
    return _backend.attention_tiles(*arrays.values(), block_rows, block_cols, rows == "key")


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which items share a pack.  `for items in plan:` gives the item indices of each pack.

    order        int64 [n]: the items of pack 0 in order of index, of pack 1, ...; an item that was split stands once
                 for each of its pieces
    offsets      int64 [packs + 1] into order
    fill         tokens over packs * budget; for several budgets, of the fullest one
    fills        the same for each budget
    lower_bound  packs that no plan can go below
    binding      what sets that bound: "budget" ("budget[k]" of several) or "max_items"
    dropped      int64: items longer than a budget, left out by long="drop"
    pieces       int64 [n, 2], first token and tokens of each entry of order; only with long="split"
    """

    order: np.ndarray
    offsets: np.ndarray
    fill: float
    fills: tuple[float, ...]
    lower_bound: int
    binding: str
    dropped: np.ndarray
    pieces: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for begin, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.order[begin:end]

    def __repr__(self) -> str:
        return (
            f"PackPlan({len(self.order)} items in {len(self)} packs, fill {self.fill:.4f}, "
            f"lower bound {self.lower_bound} by {self.binding}, {len(self.dropped)} dropped)"
        )


def plan_packs(
    lengths,
    budget: int | Sequence[int],
    *,
    costs=None,
    max_items: int | None = None,
    policy: str = "best_fit",
    long: str = "error",
) -> PackPlan:
    """Packs of items that stay within a budget, as few as the policy finds.  The same input gives the same plan.

    lengths [n] with one budget, or [n, K] (tokens, patches, frames, ...) with K budgets that all hold at once.
    policy   "best_fit": longest first, each into the fullest pack with room.  "first_fit": longest first, each into the
             first pack with room.  "stream": in order of arrival with at most 64 packs open, best fit among them.
             With several budgets, longest is by the largest share of a budget and fullest by the summed shares, over
             at most 1024 open packs
    long     an item over the budget: "error" names it, "drop" leaves it out and lists it in `dropped`, "split" cuts it
             into pieces of the budget (one budget only) and lists them in `pieces`
    Raises ValueError for such an item under long="error", and for arguments that make no plan.
    """
    if costs is not None:
        raise NotImplementedError("plan_packs: costs comes with issue 4")
    if policy not in POLICIES:
        raise ValueError(f"plan_packs: policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if long not in LONG:
        raise ValueError(f"plan_packs: long is {long!r}, expected one of {', '.join(LONG)}")
    if max_items is not None and max_items < 1:
        raise ValueError(f"plan_packs: max_items is {max_items}, expected at least 1 or None")
    lengths, budgets = _lengths_and_budgets(lengths, budget)
    items, lengths, pieces, dropped = _fit_long(lengths, budgets, long)

    order, offsets = _backend.plan_packs(lengths, budgets, max_items or len(lengths) + 1, policy)
    lower_bound, binding = _lower_bound(lengths, budgets, max_items)
    packs = len(offsets) - 1
    fills = tuple(
        float(total) / (packs * float(b)) if packs else 1.0 for total, b in zip(lengths.sum(0), budgets, strict=True)
    )
    return PackPlan(
        order=order if items is None else items[order],
        offsets=offsets,
        fill=max(fills),
        fills=fills,
        lower_bound=lower_bound,
        binding=binding,
        dropped=dropped,
        pieces=None if pieces is None else pieces[order],
    )


def _lengths_and_budgets(lengths, budget) -> tuple[np.ndarray, np.ndarray]:
    """lengths int64 [n, K] and budgets int64 [K]."""
    lengths, budgets = np.asarray(lengths), np.atleast_1d(np.asarray(budget))
    for name, array in (("lengths", lengths), ("budget", budgets)):
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"plan_packs: {name} is {array.dtype}, expected integers")
    if lengths.ndim == 1 and lengths.size == 0:
        lengths = lengths.reshape(0, len(budgets))
    elif lengths.ndim == 1:
        lengths = lengths[:, None]
    if lengths.ndim != 2 or budgets.ndim != 1 or lengths.shape[1] != len(budgets) or len(budgets) == 0:
        raise ValueError(
            f"plan_packs: lengths has shape {list(lengths.shape)} for {budgets.size} budgets, expected [n] or [n, K]"
        )
    lengths, budgets = np.ascontiguousarray(lengths, np.int64), np.ascontiguousarray(budgets, np.int64)
    if (budgets < 1).any():
        raise ValueError(f"plan_packs: budget is {budget}, expected at least 1")
    if (lengths < 0).any():
        raise ValueError(f"plan_packs: item {np.argmax((lengths < 0).any(1))} has a negative length")
    return lengths, budgets


def _fit_long(lengths: np.ndarray, budgets: np.ndarray, long: str):
    """(item of each entry, or None for the identity; lengths that fit; pieces or None; dropped items)."""
    nothing = np.zeros(0, np.int64)
    over = lengths > budgets
    if long == "split":
        if len(budgets) > 1:
            raise ValueError(f"plan_packs: long='split' needs one budget, got {len(budgets)}")
        items = np.repeat(np.arange(len(lengths)), np.maximum(-(-lengths[:, 0] // budgets[0]), 1))
        first_of_item = np.searchsorted(items, items)
        start = (np.arange(len(items)) - first_of_item) * budgets[0]
        tokens = np.minimum(lengths[items, 0] - start, budgets[0])
        return items, np.ascontiguousarray(tokens[:, None]), np.stack([start, tokens], 1), nothing
    if not over.any():
        return None, lengths, None, nothing
    too_long = over.any(1)
    if long == "error":
        item = int(np.argmax(too_long))
        k = int(np.argmax(lengths[item] > budgets))
        column = f"[{k}]" if len(budgets) > 1 else ""
        raise ValueError(
            f"plan_packs: item {item} has length{column} {lengths[item, k]}, over the budget{column} of {budgets[k]}; "
            "long='split' or long='drop' accept it"
        )
    kept = np.flatnonzero(~too_long)
    return kept, lengths[kept], None, np.flatnonzero(too_long)


def _lower_bound(lengths: np.ndarray, budgets: np.ndarray, max_items: int | None) -> tuple[int, str]:
    """The largest of: tokens over budget, items over half a budget (no two share a pack), items over max_items."""
    bounds = {}
    for k, budget in enumerate(budgets.tolist()):
        name = "budget" if len(budgets) == 1 else f"budget[{k}]"
        column = lengths[:, k]
        bounds[name] = max(-(-int(column.sum()) // budget), int((column > budget // 2).sum()))
    if max_items is not None:
        bounds["max_items"] = -(-len(lengths) // max_items)
    binding = max(bounds, key=bounds.__getitem__)  # the first of equals
    return max(bounds[binding], int(len(lengths) > 0)), binding


def _int32(function: str, name: str, value, columns: int | None = None) -> np.ndarray:
    """`value` as a contiguous int32 array of one axis, or of two with `columns` columns; never rounds or wraps."""
    array = np.asarray(value)
    shape_ok = array.ndim == 1 if columns is None else array.ndim == 2 and array.shape[1] == columns
    if not shape_ok:
        expected = "[n]" if columns is None else f"[n, {columns}]"
        raise ValueError(f"{function}: {name} has shape {list(array.shape)}, expected {expected}")
    if array.dtype != np.int32:
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"{function}: {name} is {array.dtype}, expected integers")
        if array.size and (array.max() > planner_numpy.INT32_MAX or array.min() < -(2**31)):
            raise ValueError(f"{function}: {name} does not fit int32")
    return np.ascontiguousarray(array, np.int32)

"""A lowered mask as runs: queries with one stretch of keys, grouped by shape.   Tq queries, Tk keys, R runs, n items.

What makes the CPU path fast: most runs see all of their keys, or causally, and need no mask, however the batch is
mixed.  The others have the mask of their own rows and keys alone, in blocks of rows that leave out what no row sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

FULL, CAUSAL, MASKED = range(3)  # all see all; query i sees keys 0..i of equally many; any other mask
COLUMNS = ("q_start", "q_step", "q_len", "k_start", "k_step", "k_len", "count", "kind", "mask_at")
GATHERED = -1  # as a step: tokens do not stand in a row, `start` is their place in `index`
NOT_KEPT = -1  # as mask_at

# In query-key pairs, measured at 4 heads of 64: the overhead of a call, and copying a token there and back.
CALL_COST, GATHER_COST = 2000, 16
LONG_STRETCH = 32  # rows of equal bounds that are worth a call without a mask
WIDE_ROWS = 128  # a block of masked rows; half of it where rows see fewer keys than that
MAX_WHOLE = 1 << 18  # pairs of a masked run that is not cut into blocks
MAX_KEPT = 1 << 24  # mask elements kept per plan, 64 MiB; masks beyond it are built in each call


class Runs(NamedTuple):
    """table  int32 [R, 9]: `count` items of q_len queries and k_len keys each, COLUMNS.  Item i has the queries from
              q_start + i q_step and the keys from k_start + i k_step; gathered: index[start + i len ...]
    index  int32 [n]: queries and keys of gathered runs
    masks  fp32 [n]: 0 or -inf, row by row, from mask_at on; equal masks are there once
    blind  int32 [n]: queries that see nothing.  They are in no run, and every row of a run sees something
    covered  every key is in exactly one item, so that its gradient is written once
    """

    table: np.ndarray
    index: np.ndarray
    masks: np.ndarray
    blind: np.ndarray
    covered: bool


class _Piece(NamedTuple):
    """Queries and keys (packed indices, ascending) and bounds that count in `keys`: rising, and never empty."""

    queries: np.ndarray
    keys: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    bits: tuple[np.ndarray, np.ndarray] | None = None  # of queries and keys, where modalities hide keys


class _Item(NamedTuple):
    """What one call computes, alone or beside others of its shape and mask."""

    queries: np.ndarray
    keys: np.ndarray
    kind: int
    mask: tuple | None = None  # lo, hi [q_len] within `keys`, and bits


def find_runs(cu_q: np.ndarray, cu_k: np.ndarray, q_table: np.ndarray, k_table: np.ndarray, has_visible: bool) -> Runs:
    """Runs of a MaskPlan's tables on the bounds of its two layouts."""
    items: list[_Item] = []
    for piece in _pieces(cu_q.tolist(), cu_k.tolist(), q_table, k_table, has_visible):
        items += _cut(piece)
    seeing = np.zeros(q_table.shape[1], bool)
    uses = np.zeros(k_table.shape[1], np.int64)
    for item in items:
        seeing[item.queries] = True
        uses[item.keys] += 1
    return Runs(*_group(items), np.flatnonzero(~seeing).astype(np.int32), bool((uses == 1).all()))


def _pieces(cu_q, cu_k, q_table, k_table, has_visible) -> Iterator[_Piece]:
    """Each sample's queries by what they see, in one piece or several, whichever costs less to compute."""
    lo, hi, q_bits = q_table[:3].astype(np.int64)
    k_bits = k_table[2].astype(np.int64)
    queries, keys = np.arange(len(lo)), np.arange(len(k_bits))
    for start, stop, first, last in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        if start == stop or first == last:
            continue
        rows, cols = slice(start, stop), slice(first, last)
        own = _Piece(queries[rows], keys[cols], lo[rows] - first, hi[rows] - first)
        if not has_visible:
            yield from _seeing(own)
            continue
        bits = q_bits[rows] & np.bitwise_or.reduce(k_bits[cols])
        kinds = sorted(set(bits.tolist()))
        parts = [part for b in kinds for part in _seeing(_of_bits(own, bits == b, k_bits[cols], b))]
        if len(parts) > 1:
            seen = np.sort(np.concatenate([part.queries for part in parts])) - start
            whole = own._replace(
                queries=own.queries[seen], lo=own.lo[seen], hi=own.hi[seen], bits=(bits[seen], k_bits[cols])
            )
            parts = min(parts, [whole], key=_cost)
        yield from parts


def _of_bits(own: _Piece, rows: np.ndarray, k_bits: np.ndarray, bits: int) -> _Piece:
    """The given rows, and only the keys whose modality is in `bits`: their bounds in those keys rise just the same."""
    seen = (k_bits & bits) != 0
    before = np.concatenate(([0], np.cumsum(seen)))  # visible keys before each key
    return _Piece(own.queries[rows], own.keys[seen], before[own.lo[rows]], before[own.hi[rows]])


def _seeing(piece: _Piece) -> Iterator[_Piece]:
    """The piece without the rows that see nothing."""
    seeing = piece.lo < piece.hi
    if seeing.all():
        yield piece
    elif seeing.any():
        yield piece._replace(queries=piece.queries[seeing], lo=piece.lo[seeing], hi=piece.hi[seeing])


def _cut(piece: _Piece) -> Iterator[_Item]:
    """The piece in blocks of rows, each with the keys that its rows reach."""
    for start, stop in _blocks(piece.lo, piece.hi):
        first, last = piece.lo[start], piece.hi[stop - 1]
        queries, keys = piece.queries[start:stop], piece.keys[first:last]
        lo, hi = piece.lo[start:stop] - first, piece.hi[start:stop] - first
        bits = None
        if piece.bits is not None:
            bits = piece.bits[0][start:stop], piece.bits[1][first:last]
            if (np.bitwise_and.reduce(bits[0]) & np.bitwise_or.reduce(bits[1])) == np.bitwise_or.reduce(bits[1]):
                bits = None
        kind = MASKED if bits is not None else _kind(lo, hi)
        yield _Item(queries, keys, kind, (lo, hi, bits) if kind == MASKED else None)


def _kind(lo: np.ndarray, hi: np.ndarray) -> int:
    """Of rows whose bounds rise from 0 and end with the last key."""
    if lo[-1] == 0 and hi[0] == hi[-1]:
        return FULL
    if lo[-1] == 0 and hi[0] == 1 and hi[-1] == len(hi) and (np.diff(hi) == 1).all():
        return CAUSAL
    return MASKED


def _blocks(lo: np.ndarray, hi: np.ndarray) -> list[tuple[int, int]]:
    """Rows of each block: long stretches of equal bounds by themselves, what lies between in blocks of equal height.

    One block where it costs less than these.
    """
    rows, whole = len(lo), len(lo) * int(hi[-1] - lo[0])
    if whole <= CALL_COST or _kind(lo - lo[0], hi - lo[0]) != MASKED:
        return [(0, rows)]
    height = WIDE_ROWS if hi.sum() - lo.sum() >= WIDE_ROWS * rows else WIDE_ROWS // 2
    changes = np.flatnonzero((np.diff(lo) != 0) | (np.diff(hi) != 0)) + 1
    begins, ends = np.concatenate(([0], changes)), np.concatenate((changes, [rows]))
    long = ends - begins >= LONG_STRETCH
    blocks, done = [], 0
    for begin, end in [*zip(begins[long].tolist(), ends[long].tolist(), strict=True), (rows, rows)]:
        blocks += [(row, min(row + height, begin)) for row in range(done, begin, height)]
        if begin < end:
            blocks.append((begin, end))
        done = end
    if whole <= MAX_WHOLE and whole <= sum(CALL_COST + (b - a) * int(hi[b - 1] - lo[a]) for a, b in blocks):
        return [(0, rows)]
    return blocks


def _cost(pieces: list[_Piece]) -> int:
    cost = 0
    for queries, keys, lo, hi, _ in pieces:
        cost += CALL_COST + int(hi.sum() - lo.sum())
        cost += GATHER_COST * sum(len(tokens) for tokens in (queries, keys) if not _in_a_row(tokens))
    return cost


def _in_a_row(tokens: np.ndarray) -> bool:
    return bool(tokens[-1] - tokens[0] + 1 == len(tokens))


def _group(items: list[_Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table, index and masks of the items: those of one shape and mask become one run where their starts allow it."""
    groups: dict[tuple, list[_Item]] = {}
    masks: dict[tuple, tuple] = {}
    for item in items:
        key = None
        if item.mask is not None:
            lo, hi, bits = item.mask
            key = (lo.tobytes(), hi.tobytes(), b"" if bits is None else bits[0].tobytes() + b" " + bits[1].tobytes())
            masks.setdefault((len(item.queries), len(item.keys), key), item.mask)
        shape = (len(item.queries), len(item.keys), key)
        groups.setdefault((*shape, item.kind, _in_a_row(item.queries), _in_a_row(item.keys)), []).append(item)
    kept, mask_at = _kept_masks(masks)
    table, index, size = [], [], 0
    for (q_len, k_len, key, kind, *in_a_row), members in groups.items():
        starts = []  # per side, of each member
        for tokens, placed in zip(([m.queries for m in members], [m.keys for m in members]), in_a_row, strict=True):
            if placed:
                starts.append([int(t[0]) for t in tokens])
            else:
                starts.append([size + i * len(t) for i, t in enumerate(tokens)])
                index += tokens
                size += sum(map(len, tokens))
        for q_start, q_step, k_start, k_step, count in _progressions(*starts):
            steps = (q_step if in_a_row[0] else GATHERED), (k_step if in_a_row[1] else GATHERED)
            at = mask_at.get((q_len, k_len, key), NOT_KEPT)
            table.append((q_start, steps[0], q_len, k_start, steps[1], k_len, count, kind, at))
    index = np.concatenate(index).astype(np.int32) if index else np.empty(0, np.int32)
    return np.array(table, np.int32).reshape(-1, len(COLUMNS)), index, kept


def _progressions(q_starts: list[int], k_starts: list[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Start and step of queries and keys, and count, of each stretch of items that stand at equal distances."""
    i = 0
    while i < len(q_starts):
        j = i + 1
        q_step = k_step = 0
        if j < len(q_starts):
            q_step, k_step = q_starts[j] - q_starts[i], k_starts[j] - k_starts[i]
            while (
                j < len(q_starts)
                and q_starts[j] - q_starts[j - 1] == q_step > 0
                and k_starts[j] - k_starts[j - 1] == k_step >= 0
            ):
                j += 1
        yield q_starts[i], q_step, k_starts[i], k_step, j - i
        i = j


def _kept_masks(masks: dict[tuple, tuple]) -> tuple[np.ndarray, dict[tuple, int]]:
    """The masks as one array, and where each begins; the array ends where MAX_KEPT would be passed."""
    arrays, places, size = [np.empty(0, np.float32)], {}, 0
    for key, (lo, hi, bits) in masks.items():
        if size + key[0] * key[1] > MAX_KEPT:
            continue
        cols = np.arange(key[1])
        seen = (cols >= lo[:, None]) & (cols < hi[:, None])
        if bits is not None:
            seen &= (bits[0][:, None] & bits[1]) != 0
        arrays.append(np.where(seen, np.float32(0), np.float32(-np.inf)).ravel())
        places[key] = size
        size += seen.size
    return np.concatenate(arrays), places

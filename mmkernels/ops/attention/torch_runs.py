"""A lowered mask as runs: contiguous stretches of the batch that see nothing but themselves.   T tokens, R runs.

What makes the CPU path fast: a run that sees itself whole, or causally, needs no mask, however the batch is mixed.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

FULL, CAUSAL, MASKED, BLIND = range(4)  # all see all; key at or before query; any other mask; nobody sees anything


def runs(cu_seqlens: np.ndarray, q_table: np.ndarray, k_table: np.ndarray, has_visible: bool) -> np.ndarray:
    """int32 [R, 4]: start, length, count, kind.  `count` runs of equal length and kind stand one after another.

    The tables are MaskPlan's.  Empty samples are in no run.
    """
    table = np.stack([*q_table[:3], k_table[2]])
    found: list[list[int]] = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        bounds = _split(table, start, stop) if has_visible and stop > start else [start, stop]
        for run_start, run_stop in pairwise(bounds):
            if run_start == run_stop:
                continue
            length, kind = run_stop - run_start, _kind(table, run_start, run_stop, has_visible)
            last = found[-1] if found else None
            # Runs touch, so equal ones in a row are one batch; MASKED ones each have a mask of their own.
            if last and kind != MASKED and (last[1], last[3]) == (length, kind):
                last[2] += 1
            else:
                found.append([run_start, length, 1, kind])
    return np.array(found, np.int32).reshape(-1, 4)


def _split(table: np.ndarray, start: int, stop: int) -> list[int]:
    """Bounds of the finest contiguous pieces of a sample that do not see one another."""
    lo, hi, q_bits, k_bits = table[:, start:stop]
    changes = np.flatnonzero((np.diff(q_bits) != 0) | (np.diff(k_bits) != 0)) + 1
    first = np.concatenate(([0], changes))  # pieces of one modality each
    last = np.concatenate((changes, [stop - start])) - 1
    # Piece a sees piece b where the bits meet and the keys of a's queries (an interval: both bounds rise) reach into b.
    meets = (q_bits[first][:, None] & k_bits[first]) != 0
    reaches = (lo[first][:, None] <= start + last) & (hi[last][:, None] > start + first)
    a, b = np.nonzero(meets & reaches)
    # A cut before piece c stands if no pair (a, b) lies across it.
    across = np.zeros(len(first) + 1, np.int64)
    np.add.at(across, np.minimum(a, b) + 1, 1)
    np.add.at(across, np.maximum(a, b) + 1, -1)
    cuts = np.flatnonzero(np.cumsum(across)[: len(first)] == 0)
    return [*(start + first[cuts]).tolist(), stop]


def _kind(table: np.ndarray, start: int, stop: int, has_visible: bool) -> int:
    lo, hi, q_bits, k_bits = table[:, start:stop]
    if has_visible:
        met = np.unique(q_bits)[:, None] & np.unique(k_bits) != 0
        if not met.any():
            return BLIND
        if not met.all():
            return MASKED
    if (lo > start).any():
        return BLIND if (lo >= hi).all() else MASKED
    if (hi >= stop).all():
        return FULL
    return CAUSAL if (np.minimum(hi, stop) == np.arange(start + 1, stop + 1)).all() else MASKED

"""Best fit decreasing in Python over a sorted list of residuals (bisect): what a data collator would write."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from benchmarks.harness import YARDSTICK, Implementation

NAME = "python_bisect"
MAX_LENGTHS = 200_000  # seconds per call beyond that


def missing(problem) -> str | None:
    return f"takes seconds above {MAX_LENGTHS} lengths" if len(problem.lengths) > MAX_LENGTHS else None


def build(problem) -> Implementation:
    def plan() -> list[list[int]]:
        lengths = problem.lengths.tolist()
        packs: list[list[int]] = []
        residuals: list[tuple[int, int]] = []  # (room left, pack), sorted
        for item in np.argsort(-problem.lengths, kind="stable").tolist():
            length = lengths[item]
            place = bisect_left(residuals, (length, -1))
            if place == len(residuals):
                room, pack = problem.budget, len(packs)
                packs.append([])
            else:
                room, pack = residuals.pop(place)
            packs[pack].append(item)
            insort(residuals, (room - length, pack))
        return packs

    def packed(packs: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        sizes = [len(pack) for pack in packs]
        return np.concatenate(packs), np.concatenate(([0], np.cumsum(sizes)))

    # It knows nothing of costs: where they are to be evened out, it does less than is asked.
    extra = {} if problem.costs is None else YARDSTICK
    return Implementation(NAME, plan, packed=packed, extra=extra)

"""Best fit decreasing by the sum of a sample's lengths: what packs one number per sample, told to obey all budgets.

Longest sum first, into the pack with the least summed room in which every budget holds; all packs stay open.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Implementation

NAME = "sum_of_lengths"
MAX_LENGTHS = 30_000  # looks at every pack for each item


def missing(problem) -> str | None:
    return f"takes minutes above {MAX_LENGTHS} items" if len(problem.lengths) > MAX_LENGTHS else None


def build(problem) -> Implementation:
    budgets = np.asarray(problem.budget, np.int64)

    def plan() -> tuple[np.ndarray, int]:
        lengths = problem.lengths.astype(np.int64)
        sums = lengths.sum(1)
        pack_of = np.empty(len(lengths), np.int64)
        room = np.tile(budgets, (1024, 1))
        packs = 0
        for item in np.argsort(-sums, kind="stable"):
            fitting = np.flatnonzero((lengths[item] <= room[:packs]).all(1))
            if len(fitting):
                chosen = fitting[np.argmin(room[fitting].sum(1))]
            else:
                chosen = packs
                packs += 1
                if packs == len(room):
                    room = np.concatenate([room, np.tile(budgets, (len(room), 1))])
            pack_of[item] = chosen
            room[chosen] -= lengths[item]
        return pack_of, packs

    def packed(answer: tuple[np.ndarray, int]) -> tuple[np.ndarray, np.ndarray]:
        pack_of, packs = answer
        counts = np.bincount(pack_of, minlength=packs)
        return np.argsort(pack_of, kind="stable"), np.concatenate([[0], np.cumsum(counts)])

    return Implementation(NAME, plan, packed=packed)

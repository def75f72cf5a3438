"""Karmarkar and Karp's differencing method in Python: what reinforcement-learning trainers balance ranks with.

Two partial assignments are joined, the heaviest part of one with the lightest of the other, until one is left.
"""

from __future__ import annotations

import heapq

import numpy as np

from benchmarks.harness import Implementation

NAME = "karmarkar_karp"
MAX_ITEMS = 10_000


def missing(problem) -> str | None:
    return f"takes seconds above {MAX_ITEMS} items" if len(problem.costs) > MAX_ITEMS else None


def build(problem) -> Implementation:
    def plan() -> list[list[int]]:
        ranks = problem.world_size
        heap = []  # (-spread, tie, parts as (load, items), heaviest first)
        for item, cost in enumerate(problem.costs.tolist()):
            heap.append((-cost, item, [(cost, [item])] + [(0.0, [])] * (ranks - 1)))
        heapq.heapify(heap)
        while len(heap) > 1:
            (_, _, one), (_, tie, other) = heapq.heappop(heap), heapq.heappop(heap)
            parts = [(a + b, x + y) for (a, x), (b, y) in zip(one, reversed(other), strict=True)]
            parts.sort(key=lambda part: -part[0])
            heapq.heappush(heap, (parts[-1][0] - parts[0][0], tie, parts))
        return [items for _, items in heap[0][2]]

    def packed(parts: list[list[int]]) -> tuple[np.ndarray, bool]:
        rank_of = np.empty(len(problem.costs), np.int64)
        for rank, items in enumerate(parts):
            rank_of[items] = rank
        return rank_of, False  # counts are as they come

    return Implementation(NAME, plan, packed=packed)

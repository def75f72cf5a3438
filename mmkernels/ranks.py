"""Ranks: which of them does which item, so that all have as much to do.   n items, K costs, R ranks

numpy in, numpy out.  C++ (csrc/planner) where it is built, else packs_numpy.py; both give equal answers.
"""

from __future__ import annotations

import numpy as np

from mmkernels.arguments import at_least_one, host_array
from mmkernels.planner_backend import packs as _backend


def balance_ranks(costs, world_size: int, *, equal_count: bool = False) -> np.ndarray:
    """The rank of each item, int64 [n], such that the costliest rank costs little more than the mean.

    costs [n], or [n, K] of several kinds that should each be even (tokens, patches, frames); any numbers >= 0.
    A rank's load is its cost over the mean of all ranks, the largest of K kinds.  Items go, costliest first, to the
    rank whose load then is least; then the heaviest rank gives items away or swaps them while that lowers the greatest
    load (for up to 2**24 pairs of items: with more items there is little left to gain).
    equal_count  ranks get equally many items, or one more where world_size does not divide n

    With one kind the greatest load is at most 4/3 of the best possible (longest processing time first); with
    equal_count or several kinds there is no bound (docs/planner.md has figures).
    The same input gives the same ranks.  Raises ValueError for costs that are negative, not finite or not numbers.
    """
    costs = host_array("balance_ranks", "costs", costs, "iuf")
    world_size = at_least_one("balance_ranks", "world_size", world_size)
    if costs.ndim not in (1, 2) or (costs.ndim == 2 and costs.shape[1] == 0):
        raise ValueError(f"balance_ranks: costs has shape {list(costs.shape)}, expected [n] or [n, K]")
    costs = costs.reshape(len(costs), -1 if costs.size else 1).astype(np.float64)
    wrong = (~np.isfinite(costs) | (costs < 0)).any(1)
    if wrong.any():
        item = int(np.argmax(wrong))
        raise ValueError(f"balance_ranks: item {item} costs {costs[item].tolist()}, expected finite numbers >= 0")
    with np.errstate(over="ignore"):
        totals = costs.sum(0)
    if not np.isfinite(totals).all():
        raise ValueError("balance_ranks: costs sum to more than a float64 holds")
    loads = costs / np.where(totals > 0, totals / world_size, 1.0)
    order = np.argsort(-loads.max(1), kind="stable") if len(costs) else np.zeros(0, np.int64)
    ranks = min(world_size, max(len(costs), 1))  # with more of them, the rest has nothing to do
    return _backend.balance_ranks(np.ascontiguousarray(loads), order, ranks, bool(equal_count))

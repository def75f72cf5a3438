"""Packs: which items share one, under one budget or several, and work to balance.   n items, K budgets

numpy in, numpy out.  C++ (csrc/planner) where it is built, else packs_numpy.py; both give equal plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmkernels.arguments import at_least_one, host_array, one_of
from mmkernels.planner_backend import packs as _backend

POLICIES = ("best_fit", "first_fit", "stream")
LONG = ("error", "split", "drop")
OPEN_SORTED, OPEN_STREAM = 1024, 64  # packs that an item may go to: over several budgets, and in a stream
ROUND = 4096  # items of one round over several budgets
MOST_PIECES = 2**31 - 1  # what an index of csrc/planner/packs.cpp counts to
COST_SLACK_PERCENT = 2  # what a pack's cost may be over the mean of the fewest packs


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which items share a pack.  `for items in plan:` gives the item indices of each pack.

    order        int64 [n]: the items of pack 0 in order of index, of pack 1, ...; an item that was split stands once
                 for each of its pieces
    offsets      int64 [packs + 1] into order
    fill         tokens over packs * budget; for several budgets, of the fullest one
    fills        the same for each budget
    lower_bound  packs that no plan can go below
    binding      what sets that bound: "budget" ("budget[k]" of several), "max_items" or "costs"
    dropped      int64: items longer than a budget, left out by long="drop"
    pieces       int64 [n, 2], first token and tokens of each entry of order; only with long="split"
    costs        [packs], the summed cost of each pack; only with costs
    cost_cap     what none of them passes; only with costs
    """

    order: np.ndarray
    offsets: np.ndarray
    fill: float
    fills: tuple[float, ...]
    lower_bound: int
    binding: str
    dropped: np.ndarray
    pieces: np.ndarray | None = None
    costs: np.ndarray | None = None
    cost_cap: float | None = None

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
    policy   "best_fit": longest first, each into the fullest pack with room.  With several budgets the better of two
             plans: packs filled one after another, each time with the item, of 128 that fit, that leaves the least
             room; and items by falling share of a budget, each into the fullest of 1024 open packs
             "first_fit": longest first, each into the first pack with room; with several budgets by falling share of a
             budget, into the first of 1024 open packs
             "stream": in order of arrival, each into the fullest of at most 64 open packs; as PackStream does
    costs    [n] work of each item, e.g. a * length + b * length**2.  It is packed as one more budget, of
             max(largest cost, 1.02 * total cost / fewest packs that the budgets allow).  No pack costs more: the
             costliest is within 2 % of the mean of a plan with the fewest packs, unless a single item costs more than
             that.  Packs that are full by another budget may cost less.  For a cap of your own, make it a column of
             lengths
    max_items  per pack
    long     an item over the budget: "error" names it, "drop" leaves it out and lists it in `dropped`, "split" cuts it
             into pieces of the budget (one budget and no costs) and lists them in `pieces`
    Time is O(n + budget) for one budget without costs (first_fit: n log n); several, and costs, take some us an item.
    Raises ValueError for such an item under long="error", and for arguments that make no plan.
    """
    one_of("plan_packs", "policy", policy, POLICIES)
    one_of("plan_packs", "long", long, LONG)
    max_items = None if max_items is None else at_least_one("plan_packs", "max_items", max_items, " or None")
    lengths, budgets = lengths_and_budgets("plan_packs", lengths, budget)
    splits = len(budgets) == 1 and costs is None
    if long == "split" and not splits:
        came = "costs" if costs is not None else f"{len(budgets)} budgets"
        raise ValueError(f"plan_packs: long='split' needs one budget and no costs, got {came}")
    items, lengths, pieces, dropped = _fit_long(lengths, budgets, long, splits)
    totals = lengths.sum(0, dtype=np.int64)
    bounds = _lower_bounds(lengths, totals, budgets, max_items)

    columns, limits, cap = lengths, budgets, None
    if costs is not None:
        costs = _costs(costs, len(lengths) + len(dropped))
        costs = costs if items is None else costs[items]
        column, limit, cap = _cost_column(costs, max(1, *bounds.values()))
        columns, limits = np.column_stack([lengths, column]), np.append(budgets, limit)
        bounds["costs"] = -(-int(column.sum()) // limit)
    binding = max(bounds, key=bounds.__getitem__)  # the first of equals
    most = len(lengths) + 1  # as good as no limit
    order, offsets = _pack(columns, limits, min(max_items or most, most), policy, bounds[binding])
    packs = len(offsets) - 1
    fills = tuple(float(t) / (packs * float(b)) if packs else 1.0 for t, b in zip(totals, budgets, strict=True))
    return PackPlan(
        order=order if items is None else items[order],
        offsets=offsets,
        fill=max(fills),
        fills=fills,
        lower_bound=max(bounds[binding], int(len(lengths) > 0)),
        binding=binding,
        dropped=dropped,
        pieces=None if pieces is None else pieces[order],
        costs=None if costs is None else np.add.reduceat(costs[order], offsets[:-1]) if packs else costs[:0],
        cost_cap=cap,
    )


def _pack(lengths, budgets, max_items: int, policy: str, bound: int) -> tuple[np.ndarray, np.ndarray]:
    """(order [n], offsets [packs + 1]) of lengths [n, K] that fit; no plan has fewer packs than bound."""
    if len(budgets) == 1 and policy != "stream":
        column = np.ascontiguousarray(lengths[:, 0])
        return _backend.plan_packs(column, int(budgets[0]), max_items, policy == "first_fit")
    lengths, shares = np.ascontiguousarray(lengths, np.int64), 1.0 / budgets

    def scan(falling, scales, max_open, first=False):
        nothing = np.zeros(0, np.int64)
        state = (nothing, nothing, np.zeros((0, len(budgets)), np.int64), 0)
        found, *_, packs = _backend.scan_fit(lengths[falling], budgets, scales, max_items, max_open, first, state)
        return _unsorted(found, falling), packs

    if policy == "stream":
        return _backend.group_by_pack(*scan(np.arange(len(lengths)), shares, OPEN_STREAM))
    need = lengths.sum(0, dtype=np.float64) * shares
    need = need / need.max() if need.any() else np.ones(len(budgets))  # a budget counts as far as it is needed
    by_share = _in_rounds(np.argsort(-(lengths * (need * shares)).max(1, initial=0), kind="stable"))
    if policy == "first_fit":
        return _backend.group_by_pack(*scan(by_share, shares, OPEN_SORTED, first=True))
    sizes = (lengths * (need * shares)).sum(1)
    by_size = np.argsort(-sizes, kind="stable")
    found, packs = _backend.pool_fit(
        lengths[by_size], budgets, np.sqrt(need) * shares, max_items, sizes[by_size], need * shares
    )
    plan = _unsorted(found, by_size), packs
    if packs > bound:
        plan = min(plan, scan(by_share, need**4 * shares, OPEN_SORTED), key=lambda plan: plan[1])  # the first of equals
    return _backend.group_by_pack(*plan)


def _unsorted(found: np.ndarray, falling: np.ndarray) -> np.ndarray:
    pack_of = np.empty(len(found), np.int64)
    pack_of[falling] = found
    return pack_of


def _in_rounds(falling: np.ndarray) -> np.ndarray:
    """Every r-th item, then every r-th of the rest ...: rounds of about ROUND items that each see the mix of all."""
    rounds = max(1, round(len(falling) / ROUND))
    return np.concatenate([falling[start::rounds] for start in range(rounds)])


def budgets_of(function: str, budget) -> np.ndarray:
    budgets = np.atleast_1d(host_array(function, "budget", budget))
    if budgets.ndim != 1 or len(budgets) == 0:
        raise ValueError(f"{function}: budget has shape {list(budgets.shape)}, expected one number or [K]")
    if (budgets < 1).any() or (budgets >= 2**63).any():
        raise ValueError(f"{function}: budget is {budget}, expected 1 to 2**63 - 1")
    return np.ascontiguousarray(budgets, np.int64)


def lengths_and_budgets(function: str, lengths, budget) -> tuple[np.ndarray, np.ndarray]:
    """lengths [n, K], int32 as they came or else int64, and budgets int64 [K]."""
    lengths, budgets = host_array(function, "lengths", lengths), budgets_of(function, budget)
    if lengths.ndim == 1 and lengths.size == 0:
        lengths = lengths.reshape(0, len(budgets))
    elif lengths.ndim == 1:
        lengths = lengths[:, None]
    if lengths.ndim != 2 or lengths.shape[1] != len(budgets):
        raise ValueError(
            f"{function}: lengths has shape {list(lengths.shape)} for {budgets.size} budgets, expected [n] or [n, K]"
        )
    if lengths.size and (lengths.min() < 0 or lengths.max() >= 2**63):
        item = np.argmax(((lengths < 0) | (lengths >= 2**63)).any(1))
        raise ValueError(f"{function}: item {item} has length {lengths[item].tolist()}, expected 0 to 2**63 - 1")
    lengths = np.ascontiguousarray(lengths, np.int32 if lengths.dtype == np.int32 else np.int64)
    if lengths.size and int(lengths.max()) * len(lengths) >= 2**62 and lengths.sum(0, np.float64).max() >= 2**62:
        raise ValueError(f"{function}: lengths sum to 2**62 or more, which int64 does not hold safely")
    return lengths, budgets


def reject_long(function: str, lengths: np.ndarray, budgets: np.ndarray, first: int, advice: str) -> None:
    over = lengths > budgets
    if not over.any():
        return
    item = int(np.argmax(over.any(1)))
    k = int(np.argmax(over[item]))
    column = f"[{k}]" if len(budgets) > 1 else ""
    raise ValueError(
        f"{function}: item {first + item} has length{column} {lengths[item, k]}, "
        f"over the budget{column} of {budgets[k]}; {advice}"
    )


def _fit_long(lengths: np.ndarray, budgets: np.ndarray, long: str, splits: bool):
    """(item of each entry, or None for the identity; lengths that fit; pieces or None; dropped items)."""
    nothing = np.zeros(0, np.int64)
    if long == "split":
        pieces_of = np.maximum(-(-lengths[:, 0].astype(np.int64) // budgets[0]), 1)
        if (total := int(pieces_of.sum())) > MOST_PIECES:
            raise ValueError(
                f"plan_packs: budget {budgets[0]} splits the lengths into {total} pieces, expected at most 2**31 - 1"
            )
        items = np.repeat(np.arange(len(lengths)), pieces_of)
        first_of_item = np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
        start = (np.arange(len(items)) - first_of_item) * budgets[0]
        tokens = np.minimum(lengths[items, 0] - start, budgets[0])
        return items, np.ascontiguousarray(tokens[:, None]), np.stack([start, tokens], 1), nothing
    if not len(lengths) or (lengths.max(0) <= budgets).all():
        return None, lengths, None, nothing
    if long == "error":
        advice = "long='split' or long='drop' accept it" if splits else "long='drop' accepts it"
        reject_long("plan_packs", lengths, budgets, 0, advice)
    too_long = (lengths > budgets).any(1)
    kept = np.flatnonzero(~too_long)
    return kept, lengths[kept], None, np.flatnonzero(too_long)


def _lower_bounds(lengths, totals, budgets, max_items: int | None) -> dict[str, int]:
    """Packs needed for: tokens over a budget, items over half a budget (no two share a pack), items over max_items."""
    bounds = {}
    for k, (total, budget) in enumerate(zip(totals.tolist(), budgets.tolist(), strict=True)):
        name = "budget" if len(budgets) == 1 else f"budget[{k}]"
        bounds[name] = max(-(-total // budget), int(np.count_nonzero(lengths[:, k] > budget // 2)))
    if max_items is not None:
        bounds["max_items"] = -(-len(lengths) // max_items)
    return bounds


def _costs(costs, n: int) -> np.ndarray:
    costs = host_array("plan_packs", "costs", costs, "iuf")
    if costs.shape != (n,):
        raise ValueError(f"plan_packs: costs has shape {list(costs.shape)}, expected one number per item: [{n}]")
    wrong = ~np.isfinite(costs) | (costs < 0)
    if wrong.any():
        raise ValueError(f"plan_packs: item {np.argmax(wrong)} costs {costs[np.argmax(wrong)]}, expected >= 0")
    costs = costs.astype(np.float64)
    with np.errstate(over="ignore"):
        if not costs.sum() < 2.0**1023:  # twice of it, which no cap reaches, is infinite
            raise ValueError("plan_packs: costs sum to 2**1023 or more, which float64 does not hold safely")
    return costs


def _cost_column(costs: np.ndarray, packs: int) -> tuple[np.ndarray, int, float]:
    """(costs as integers, the cap on their sum per pack, the cap in the caller's unit).

    Integers add exactly, on every platform; costs are rounded up to about 2**-50 of their total, whole ones stay.
    """
    total = float(costs.sum())
    shift = 50 - math.frexp(total)[1] if total else 0  # total * 2**shift < 2**50
    column = np.ceil(np.ldexp(costs, shift)).astype(np.int64)
    share = -(-int(column.sum()) * (100 + COST_SLACK_PERCENT) // (100 * packs))
    cap = max(int(column.max(initial=0)), share, 1)
    return column, cap, math.ldexp(cap, -shift)

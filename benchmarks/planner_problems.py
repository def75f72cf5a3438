"""The kinds of planner problems: who solves them, what a right answer is.   n items, K budgets or costs, R ranks"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.harness import PREFIX, Implementation, Missing, Work
from benchmarks.peers import (
    peer_rows,
    planner_argsort,
    planner_bisect,
    planner_karmarkar_karp,
    planner_layout_torch,
    planner_round_robin,
    planner_sums,
)
from mmkernels import planner
from mmkernels.layout import PackedLayout
from mmkernels.packs import COST_SLACK_PERCENT

OURS = PREFIX + planner.BACKEND
EVENED = "costs evened out"
LAYOUT_ARRAYS = ("cu_seqlens", "modality_ids", "positions", "segment_ids", "source_rows")


@dataclass
class _Problem:
    case: str
    op: str = dataclasses.field(default="planner", init=False)
    dtype: str = dataclasses.field(default="int32", init=False)
    directions: tuple[str, ...] = dataclasses.field(default=("fwd",), init=False)

    def _peers(self, peers: tuple[ModuleType, ...]) -> Iterator[Implementation | Missing]:
        for row in peer_rows(self, peers):
            if not isinstance(row, Missing):
                with contextlib.suppress(Exception):  # who fails here fails again when checked, and its row says so
                    row = self._with_facts(row)
            yield row

    def _with_facts(self, implementation: Implementation) -> Implementation:
        found = self.facts(implementation.packed(implementation.forward()))
        return dataclasses.replace(implementation, extra=implementation.extra | found)

    def facts(self, answer: Any) -> dict[str, float]:
        """How good an answer is, for the row."""
        return {}


@dataclass
class PacksProblem(_Problem):
    """lengths int32 [n] under one budget or [n, K] under K; costs [n] to even out, or None.

    An answer: (items of each pack, bounds of the packs), and a third part where it has evened the costs out.
    """

    lengths: np.ndarray
    budget: int | tuple[int, ...]
    costs: np.ndarray | None = None

    def implementations(self) -> Iterator[Implementation | Missing]:
        def packed(plan):
            return plan.order, plan.offsets

        plain = functools.partial(planner.plan_packs, self.lengths, self.budget)
        if self.costs is None:
            yield self._with_facts(Implementation(OURS, plain, packed=packed))
        else:
            even = functools.partial(plain, costs=self.costs)
            yield self._with_facts(Implementation(OURS, even, packed=lambda plan: (*packed(plan), EVENED)))
            yield self._with_facts(Implementation(OURS + "_without_costs", plain, packed=packed))
        if self.columns.shape[1] > 1:
            peers = (planner_sums,)
        else:
            peers = (planner_bisect, planner_argsort) if self.costs is None else (planner_bisect,)
        yield from self._peers(peers)

    @property
    def columns(self) -> np.ndarray:
        return self.lengths.reshape(len(self.lengths), -1)

    def bound(self) -> int:
        """Packs that no plan can go below, recomputed here: sums, and items over half a budget, which cannot share."""
        budgets = np.atleast_1d(self.budget)
        sums = -(-self.columns.sum(0, dtype=np.int64) // budgets)
        return int(max(sums.max(), (2 * self.columns.astype(np.int64) > budgets).sum(0).max()))

    def facts(self, answer) -> dict[str, float]:
        """fill: of the fullest budget; lower_bound: packs that no plan can go below."""
        order, offsets, *_ = answer
        if offsets is None:
            return {}
        packs = len(offsets) - 1
        fill = (self.columns.sum(0, dtype=np.int64) / np.atleast_1d(self.budget)).max() / packs
        found = {"packs": packs, "lower_bound": self.bound(), "fill": round(float(fill), 5)}
        if self.costs is not None:
            costs = np.add.reduceat(self.costs[order], offsets[:-1])
            found["cost_max_over_mean"] = round(float(costs.max() / costs.mean()), 5)
        return found

    def check(self, direction: str, results: list) -> str | None:
        """Every item once, no pack over a budget; no more packs than the fullest simple method would allow; and where
        costs were evened out, no pack over what plan_packs says, 2 % above the mean of the fewest packs.

        A yardstick that only sorts has no packs: its order must be by decreasing length.
        """
        order, offsets, *evened = results[0]
        if not np.array_equal(np.sort(order), np.arange(len(self.lengths))):
            return "wrong: not every length is there exactly once"
        if offsets is None:
            return None if (np.diff(self.lengths[order]) <= 0).all() else "wrong: not sorted by decreasing length"
        packs, bound = len(offsets) - 1, self.bound()
        sums = np.add.reduceat(self.columns[order].astype(np.int64), offsets[:-1])
        if (sums > np.atleast_1d(self.budget)).any():
            return f"wrong: a pack holds {sums.max(0)} tokens, the budget is {self.budget}"
        if evened:
            costs = np.add.reduceat(self.costs[order], offsets[:-1])
            cap = max(self.costs.max(), (1 + COST_SLACK_PERCENT / 100) * self.costs.sum() / bound)
            if costs.max() > cap * (1 + 1e-9):  # sums in another order
                return f"wrong: a pack costs {costs.max():.6g}, expected at most {cap:.6g}"
        # 11/9 OPT + 1 bounds best fit decreasing under one budget; no bound that good is known under several.
        return None if packs <= 11 / 9 * bound + 1 else f"wrong: {packs} packs where {bound} might do"

    def work(self, direction: str) -> Work:
        return Work(len(self.lengths), "M lengths/s", 6, None)


@dataclass
class RanksProblem(_Problem):
    """costs [n] or [n, K] over world_size ranks.  An answer: (rank of each item, whether counts were to be equal)."""

    costs: np.ndarray
    world_size: int

    def implementations(self) -> Iterator[Implementation | Missing]:
        for name, equal_count in ((OURS, False), (OURS + "_equal_count", True)):
            call = functools.partial(planner.balance_ranks, self.costs, self.world_size, equal_count=equal_count)
            packed = functools.partial(lambda equal, ranks: (ranks, equal), equal_count)
            yield self._with_facts(Implementation(name, call, packed=packed))
        one_cost = self.costs.ndim == 1
        yield from self._peers((planner_karmarkar_karp, planner_round_robin) if one_cost else (planner_round_robin,))

    def facts(self, answer) -> dict[str, float]:
        ranks, _ = answer
        return {"max_over_mean": round(self._max_over_mean(ranks), 5), "most_items": int(np.bincount(ranks).max())}

    def check(self, direction: str, results: list) -> str | None:
        """A rank for every item; as many items each where that was asked; never less even than ranks in turn.

        Of one cost and counts that are free, the greatest load is also at most 4/3 of what no answer can go below.
        """
        ranks, equal_count = results[0]
        if ranks.shape != (len(self.costs),) or ranks.min() < 0 or ranks.max() >= self.world_size:
            return f"wrong: not every item has a rank below {self.world_size}"
        counts = np.bincount(ranks, minlength=self.world_size)
        if equal_count and counts.max() > counts.min() + 1:
            return f"wrong: ranks get {counts.min()} to {counts.max()} items, expected as many each"
        worst, allowed = self._max_over_mean(ranks), self._max_over_mean(np.arange(len(ranks)) % self.world_size)
        if self.costs.ndim == 1 and not equal_count:
            allowed = min(allowed, 4 / 3 * self._least())
        if worst > allowed * (1 + 1e-9):  # sums in another order
            return f"wrong: the costliest rank costs {worst:.4f} of the mean, expected at most {allowed:.4f}"
        return None

    def _max_over_mean(self, ranks: np.ndarray) -> float:
        """Load of the costliest rank over the mean; of the worst of K costs."""
        columns = self.costs.reshape(len(self.costs), -1).T
        loads = np.stack([np.bincount(ranks, weights=c, minlength=self.world_size) for c in columns])
        return float((loads.max(1) / loads.mean(1)).max())

    def _least(self) -> float:
        """Of one cost, what no answer's costliest rank can go below, over the mean: the costliest item; and with more
        items than ranks two of the costliest R + 1, which share one."""
        falling, mean = np.sort(self.costs)[::-1], self.costs.sum() / self.world_size
        shared = falling[self.world_size - 1 : self.world_size + 1].sum() if len(falling) > self.world_size else 0.0
        return float(max(1.0, falling[0] / mean, shared / mean))

    def work(self, direction: str) -> Work:
        return Work(len(self.costs), "M items/s", 6, None)


@dataclass
class LayoutProblem(_Problem):
    """Arrays of the packed layout of counts [B, M]."""

    counts: np.ndarray

    def implementations(self) -> Iterator[Implementation | Missing]:
        def arrays(layout: PackedLayout) -> list[np.ndarray]:
            return [getattr(layout, name).numpy() for name in LAYOUT_ARRAYS]

        yield Implementation(OURS, functools.partial(PackedLayout.from_counts, self.counts), packed=arrays)
        yield from self._peers((planner_layout_torch,))

    def check(self, direction: str, results: list) -> str | None:
        """Against loops over samples and modalities."""
        expected: list[list] = [[0], [], [], [], []]
        first, segment = [0] * self.counts.shape[1], 0
        for sample in self.counts.tolist():
            for modality, count in enumerate(sample):
                if count == 0:
                    continue
                expected[1] += [modality] * count
                expected[2] += range(count)
                expected[3] += [segment] * count
                expected[4] += range(first[modality], first[modality] + count)
                first[modality] += count
                segment += 1
            expected[0].append(len(expected[1]))
        for name, found, right in zip(LAYOUT_ARRAYS, results[0], expected, strict=True):
            if not np.array_equal(np.asarray(found).reshape(-1), right):
                return f"wrong: {name}"
        return None

    def work(self, direction: str) -> Work:
        return Work(int(self.counts.sum()), "M tokens/s", 6, None)

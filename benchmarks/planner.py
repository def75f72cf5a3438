"""Planner problems: lengths into packs of a token budget.   n lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from benchmarks.harness import PREFIX, Implementation, Missing, Work
from benchmarks.peers import planner_argsort, planner_bisect
from mmkernels import planner

PEERS: tuple[ModuleType, ...] = (planner_bisect, planner_argsort)
DTYPES_USED: dict[str, list[str]] = {"cpu": [], "cuda": []}
BUDGET = 8192


@dataclass
class PlannerProblem:
    """lengths int32 [n], each at most budget."""

    case: str
    lengths: np.ndarray
    budget: int = BUDGET
    peers: tuple[ModuleType, ...] = PEERS
    op: str = "planner"
    dtype: str = "int32"
    directions: tuple[str, ...] = ("fwd",)

    def implementations(self) -> Iterator[Implementation | Missing]:
        name = PREFIX + planner.BACKEND
        ours = functools.partial(planner.plan_packs, self.lengths, self.budget)
        plan = ours()
        fill = int(self.lengths.sum()) / ((len(plan.offsets) - 1) * self.budget)
        yield Implementation(name, ours, packed=lambda p: (p.order, p.offsets), extra={"fill": round(fill, 5)})
        for peer in self.peers:
            reason = peer.missing(self)
            yield Missing(peer.NAME, reason) if reason else peer.build(self)

    def check(self, direction: str, results: list) -> str | None:
        """Every length once, no pack over budget; and no more packs than the fullest simple method would allow.

        A yardstick that only sorts has no packs: its order must be by decreasing length.
        """
        order, offsets = results[0]
        if not np.array_equal(np.sort(order), np.arange(len(self.lengths))):
            return "wrong: not every length is there exactly once"
        if offsets is None:
            return None if (np.diff(self.lengths[order]) <= 0).all() else "wrong: not sorted by decreasing length"
        packs = len(offsets) - 1
        sums = np.add.reduceat(self.lengths[order].astype(np.int64), offsets[:-1]) if packs else np.zeros(0)
        if packs and sums.max() > self.budget:
            return f"wrong: a pack holds {sums.max()} tokens, the budget is {self.budget}"
        # 11/9 OPT + 1 bounds best fit decreasing; the sum of lengths bounds OPT from below.  Lengths over half the
        # budget cannot share, which the sum does not see.
        least = max(-(-int(self.lengths.sum()) // self.budget), int((2 * self.lengths > self.budget).sum()))
        return None if packs <= 11 / 9 * least + 1 else f"wrong: {packs} packs where {least} might do"

    def work(self, direction: str) -> Work:
        return Work(len(self.lengths), "M lengths/s", 6, None)


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[PlannerProblem]:
    if device.type != "cpu":
        raise ValueError(f"benchmarks planner: device is {device.type}, the planner runs on the host (--device cpu)")
    sizes = (10_000, 100_000) if shapes == "quick" else (10_000, 100_000, 1_000_000)
    for name, draw in DISTRIBUTIONS.items():
        for n in sizes:
            lengths = draw(np.random.default_rng(seed), n).astype(np.int32)
            yield PlannerProblem(f"{name} n{n} budget {BUDGET}", lengths)


def _mixed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Text plus image plus audio tokens of a sample, as in the packing benchmark."""
    return rng.integers(8, 64, n) + rng.integers(16, 256, n) + rng.integers(0, 512, n)


def _lognormal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.clip(rng.lognormal(6.5, 1.1, n), 1, BUDGET)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {"mixed": _mixed, "lognormal": _lognormal}

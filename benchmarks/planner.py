"""Planner problems: packs under one budget or three, even costs, ranks, layouts.   n items, K budgets, R ranks"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.planner_problems import LayoutProblem, PacksProblem, RanksProblem

SECONDS = {"quick": 20, "full": 300}
BUDGET = 8192


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[PacksProblem | RanksProblem | LayoutProblem]:
    if device.type != "cpu":
        raise ValueError(f"benchmarks planner: device is {device.type}, the planner runs on the host (--device cpu)")
    full = shapes != "quick"

    def draw(name: str, n: int) -> np.ndarray:
        return DISTRIBUTIONS[name](np.random.default_rng(seed), n).astype(np.int32)

    yield LayoutProblem("layout: 256 samples, text, image and audio", draw("trimodal", 256))
    for n, ranks in ((256, 8), (2048, 64), (65_536, 64)) if full else ((256, 8), (2048, 64)):
        yield RanksProblem(f"ranks: one cost n{n} R{ranks}", _attention_cost(draw("mixed", n)), ranks)
        yield RanksProblem(f"ranks: three costs n{n} R{ranks}", draw("trimodal", n).astype(np.float64), ranks)
    packs = [("mixed", 10_000), ("mixed", 1_000_000)]
    for name, n in packs + [("mixed", 100_000), ("lognormal", 1_000_000), ("halves", 1_000_000)] * full:
        yield PacksProblem(f"{name} n{n} budget {BUDGET}", draw(name, n), BUDGET)
    lengths = draw("mixed", 100_000 if full else 10_000)
    case = f"mixed n{len(lengths)} budget {BUDGET}, cost l + l^2/4096"
    yield PacksProblem(case, lengths, BUDGET, costs=_attention_cost(lengths))
    for n, budgets in [(5000, TIGHT)] + [(20_000, TIGHT), (20_000, COARSE), (100_000, TIGHT)] * full:
        yield PacksProblem(f"trimodal n{n} budgets {'x'.join(map(str, budgets))}", draw("trimodal", n), budgets)


def _mixed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Text plus image plus audio tokens of a sample, as in the packing benchmark."""
    return rng.integers(8, 64, n) + rng.integers(16, 256, n) + rng.integers(0, 512, n)


def _lognormal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.clip(rng.lognormal(6.5, 1.1, n), 1, BUDGET)


def _halves(rng: np.random.Generator, n: int) -> np.ndarray:
    """Around half a budget: two or three to a pack, where no heuristic fills well."""
    return rng.integers(2000, 6000, n)


def _trimodal(rng: np.random.Generator, n: int) -> np.ndarray:
    """[n, 3]: text always, an image in 70 % and audio in 50 % of the samples."""
    text = np.clip(rng.lognormal(5.0, 0.8, n), 8, 2048)
    image = (rng.random(n) < 0.7) * rng.integers(12, 33, n) * rng.integers(12, 33, n)
    audio = (rng.random(n) < 0.5) * rng.integers(50, 1500, n)
    return np.stack([text, image, audio], 1)


# Budgets of trimodal samples that are about equally tight, the hard case: 10 samples to a pack, and 5 to 6.
TIGHT, COARSE = (2048, 3500, 4096), (2048, 1820, 2000)

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "mixed": _mixed,
    "lognormal": _lognormal,
    "halves": _halves,
    "trimodal": _trimodal,
}


def _attention_cost(lengths: np.ndarray) -> np.ndarray:
    """Work of a transformer block on a sample: linear in its tokens, and attention's square."""
    tokens = lengths.astype(np.float64)
    return tokens + tokens * tokens / 4096

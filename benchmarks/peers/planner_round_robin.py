"""Item i to rank i modulo R: what a distributed sampler does, blind to costs; a yardstick of balance."""

from __future__ import annotations

import numpy as np

from benchmarks.harness import YARDSTICK, Implementation

NAME = "round_robin"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    def plan() -> np.ndarray:
        return np.arange(len(problem.costs)) % problem.world_size

    return Implementation(NAME, plan, packed=lambda ranks: (ranks, True), extra=YARDSTICK)

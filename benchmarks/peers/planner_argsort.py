"""numpy.argsort(kind="stable") of the lengths: a yardstick.  Whoever packs by decreasing length sorts at least."""

from __future__ import annotations

import numpy as np

from benchmarks.harness import YARDSTICK, Implementation

NAME = "numpy.argsort"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    negated = -problem.lengths
    return Implementation(
        NAME, lambda: np.argsort(negated, kind="stable"), packed=lambda order: (order, None), extra=YARDSTICK
    )

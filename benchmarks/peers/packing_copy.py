"""A contiguous copy of as many bytes, beside the timings: the limit of the moment, since bandwidth drifts in a run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import YARDSTICK, Implementation

NAME = "copy_"


def missing(problem) -> str | None:
    return None


def build(problem) -> Iterator[Implementation]:
    if problem.function != "pack_out":
        return
    source = problem.packed.detach().clone()
    target = torch.zeros_like(source)
    yield Implementation(NAME, lambda: target.copy_(source), directions=("fwd",), extra=YARDSTICK)

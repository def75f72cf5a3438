"""Runs the problems of one operator under a time budget and gathers the document of schema.py."""

from __future__ import annotations

import importlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import environment, harness, limits, schema, table

OPS = ("attention", "modality_embed", "packing", "planner")
SECONDS = {"quick": 60, "full": 600}  # default budget of one operator; its module may hold its own
MAX_SECONDS_PER_DIRECTION = 4.0  # beyond it more rounds no longer move a median


def run(
    op: str,
    device: torch.device,
    *,
    shapes: str = "quick",
    seconds: float | None = None,
    seed: int = 0,
    problems: Iterable[harness.Problem] | None = None,
    on_rows: Callable[[list[dict]], None] = table.print_rows,
) -> dict:
    """The document of one operator.  problems replaces the operator's own (tests).  Raises ValueError if malformed.

    Timing shares what is left of the budget evenly; where it is spent, the remaining problems' rows are skipped.
    """
    module = importlib.import_module(f"benchmarks.{op}")
    deadline = time.perf_counter() + (getattr(module, "SECONDS", SECONDS)[shapes] if seconds is None else seconds)
    todo = deque(problems if problems is not None else module.problems(shapes, device, seed))
    measured = limits.measure(device, sorted({p.dtype for p in todo} & set(module.DTYPES_USED[device.type])))
    table.print_limits(measured)
    rows: list[dict] = []
    while todo:
        share = 1 / len(todo)
        problem = todo.popleft()  # let go of each when it is done: inputs and oracles are large
        left = deadline - time.perf_counter()
        if left <= 0:
            new = [_unmeasured(problem, direction) for direction in problem.directions]
        else:
            # Half of the share is for timing; checking takes the rest.
            seconds_each = min(left * share / len(problem.directions) / 2, MAX_SECONDS_PER_DIRECTION)
            new = list(harness.run_problem(problem, measured, seconds_each, device))
        rows += new
        on_rows(new)
    document = {"environment": environment.describe(device, seed), "limits": measured, "rows": rows}
    wrong = schema.errors(document)
    if wrong:
        raise ValueError(f"benchmarks {op}: the result is malformed: {'; '.join(wrong[:5])}")
    return document


def write(document: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _unmeasured(problem: harness.Problem, direction: str) -> dict:
    identity = {"op": problem.op, "case": problem.case, "direction": direction, "dtype": problem.dtype, "impl": "all"}
    return identity | {"skipped": "the time budget was spent before this case"}

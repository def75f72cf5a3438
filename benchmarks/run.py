"""Runs the problems of operators under a time budget and gathers the document of schema.py."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType

import torch

from benchmarks import environment, harness, limits, schema, table

# In the order of `all`.  A module benchmarks/NAME.py has problems(shapes, device, seed); where products are a limit to
# it, DTYPES_USED (of which dtypes, by device); and where the default budget does not fit, SECONDS.
KNOWN = ("attention", "compat", "modality_embed", "packing", "planner", "data", "train_step")
OPS = tuple(op for op in KNOWN if importlib.util.find_spec(f"benchmarks.{op}"))
HOST_OPS = ("planner", "data")  # their work is done on the host, whatever device the others run on
SECONDS = {"quick": 60, "full": 600}  # default budget of one operator; its module may hold its own
# Of `all`, in seconds: shared in proportion to the operators' own budgets, and what one leaves goes to the next.
ALL_SECONDS = {"quick": 300, "full": 2400}
MAX_SECONDS_PER_DIRECTION = 4.0  # beyond it more rounds no longer move a median
NOT_REACHED = "the time budget was spent before this case"  # the reason of a case that nobody was tried on


def run(
    op: str,
    device: torch.device,
    *,
    shapes: str = "quick",
    seconds: float | None = None,
    seed: int = 0,
    problems: Iterable[harness.Problem] | None = None,
    case: str = "",
    on_rows: Callable[[list[dict]], None] = table.print_rows,
    save: Callable[[dict], None] | None = None,
) -> dict:
    """The document of one operator.  problems replaces the operator's own (tests); case: only those with it in their
    name and dtype.  Raises ValueError if malformed, or if no case has that name.

    Timing shares what is left of the budget evenly; where it is spent, the remaining problems' rows are skipped.  save
    gets what there is after each problem.
    """
    budget = _budget(load(op), shapes) if seconds is None else seconds
    until = time.perf_counter() + budget
    record = _Record(device, seed, {"shapes": shapes, "budget_seconds": budget}, on_rows, save)
    if case:
        everything = problems if problems is not None else load(op).problems(shapes, device, seed)
        # With the dtype: the same batch may be there in fp32 and in bf16.
        named = [(f"{problem.case} {problem.dtype}", problem) for problem in everything]
        problems = [problem for name, problem in named if case in name]
        if not problems:
            names = "; ".join(name for name, _ in named)
            raise ValueError(f"benchmarks: no case of {op} has {case!r} in its name; they are: {names}")
    _measure_all(op, device, shapes, until, seed, record, problems)
    return record.ended()


def run_all(
    device: torch.device,
    *,
    shapes: str = "quick",
    seconds: float | None = None,
    seed: int = 0,
    ops: tuple[str, ...] = OPS,
    on_rows: Callable[[list[dict]], None] = table.print_rows,
    save: Callable[[dict], None] | None = None,
) -> dict:
    """One document of all operators.  save gets what there is after each problem: a run that is cut off leaves that.

    An operator whose packages are not installed has one row, skipped with the reason.
    """
    budget = ALL_SECONDS[shapes] if seconds is None else seconds
    deadline = time.perf_counter() + budget
    record = _Record(device, seed, {"shapes": shapes, "budget_seconds": budget}, on_rows, save)
    todo = deque(ops)
    while todo:
        weights = [_weight(op, shapes) for op in todo]
        op = todo.popleft()
        left = max(deadline - time.perf_counter(), 0.0)
        until = time.perf_counter() + left * weights[0] / sum(weights)
        where = torch.device("cpu") if op in HOST_OPS else device
        try:
            _measure_all(op, where, shapes, until, seed, record, None)
        except ImportError as error:
            row = {"op": op, "case": "all", "direction": "fwd", "dtype": "any", "impl": "all"}
            record.add([row | {"skipped": f"needs a package that is not installed: {error}"}])
    table.print_missing(record.rows)
    return record.ended()


def load(op: str) -> ModuleType:
    """The module with the operator's problems.  Raises ImportError where a package that it needs is not installed."""
    return importlib.import_module(f"benchmarks.{op}")


@dataclass
class _Record:
    """What a run has found so far.  on_rows and save get the new rows, and the document, after each problem."""

    device: torch.device
    seed: int
    facts: dict
    on_rows: Callable[[list[dict]], None]
    save: Callable[[dict], None] | None
    limits: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    def add(self, rows: list[dict]) -> None:
        self.on_rows(rows)
        self.rows += rows
        if self.save is not None:
            self.save(self.document())

    def ended(self) -> dict:
        """The document, with what the machine can do by now."""
        limits.add_after(self.limits, self.device)
        table.print_after(self.limits)
        document = self.document()
        if self.save is not None:
            self.save(document)
        return document

    def document(self) -> dict:
        facts = environment.describe(self.device, self.seed) | self.facts
        document = {"environment": facts, "limits": dict(self.limits), "rows": list(self.rows)}
        wrong = schema.errors(document)
        if wrong:
            raise ValueError(f"benchmarks: the result is malformed: {'; '.join(wrong[:5])}")
        return document


def _measure_all(op, device, shapes, deadline, seed, record: _Record, problems) -> None:
    """Adds the rows of one operator, and the limits it needs, unless an earlier operator did."""
    module = load(op)
    todo = deque(problems if problems is not None else module.problems(shapes, device, seed))
    dtypes = sorted({p.dtype for p in todo} & set(getattr(module, "DTYPES_USED", {}).get(device.type, ())))
    new_limits = limits.measure(device, dtypes, known=record.limits)
    table.print_limits(new_limits)
    record.limits |= new_limits
    while todo:
        share = 1 / len(todo)
        problem = todo.popleft()  # let go of each when it is done: inputs and oracles are large
        left = deadline - time.perf_counter()
        if left <= 0:
            new = _skipped(problem, NOT_REACHED)
        else:
            # Half of the share is for timing; checking takes the rest.
            seconds_each = min(left * share / len(problem.directions) / 2, MAX_SECONDS_PER_DIRECTION)
            new = _measured(problem, record.limits, seconds_each, device, deadline)
        record.add(new)
        del problem
        free_memory(device)


def free_memory(device: torch.device) -> None:
    """What a problem held, for the next, whose tensors are of other sizes; some models refer to themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measured(problem, measured: dict, seconds_each: float, device: torch.device, deadline: float) -> list[dict]:
    """Rows of one problem.  What breaks it beyond one implementation (no memory for its inputs) costs no other's."""
    rows: list[dict] = []
    try:
        rows += (row for row in harness.run_problem(harness.built(problem), measured, seconds_each, device, deadline))
    except Exception as error:
        traceback.print_exc()
        rows += _skipped(problem, f"failed: {harness.in_a_line(error)}")
    return rows


def _skipped(problem: harness.Problem | harness.Deferred, reason: str) -> list[dict]:
    """A row for each direction: nobody was timed."""
    return [harness.identity(problem, direction, "all") | {"skipped": reason} for direction in problem.directions]


def _budget(module: ModuleType, shapes: str) -> float:
    return getattr(module, "SECONDS", SECONDS)[shapes]


def _weight(op: str, shapes: str) -> float:
    try:
        return _budget(load(op), shapes)
    except ImportError:
        return 0.01  # it will be skipped at once

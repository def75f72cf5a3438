"""Times implementations of one problem side by side: checked first, one process, rotated, warmed up.

A *problem* is one case of one operator: inputs, the oracle's answer, the work it takes, and who can solve it.  An
*implementation* is one way to solve it, ours or a peer's.  A wrong implementation is never timed.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

PREFIX = "mm."  # rows of mm.triton, mm.cpp ... are ours, beside the peers' own names
MIN_ROUNDS = 5  # a median and quartiles need some
SLOW_SECONDS = 1.0  # a call may take that long by itself, also where the budget is short
MIN_SLOW_ROUNDS = 2  # beyond it
MIN_STEP_ROUNDS = 3  # of whole training steps: their ratios are what is claimed, and one sample may be an outlier
MAX_ROUNDS = 200
SETTLED = 0.01  # a median known to 1 % (95 %) needs no further rounds: the time goes to later cases
SETTLED_EVERY = 8  # rounds between two looks
SLOW_MS = 500.0  # one warm-up call of that length has warmed everything; checking was another
MIN_SAMPLE_MS = 1.0  # CPU: shorter calls are repeated within a sample, or the clock shows
LONG_MS = 30.0  # CPU: what another left in caches and in the allocator does not show in a call of that length
UNCOUNTED = 2  # CPU: calls, or more, before a sample of shorter ones
CYCLES_PER_MS = 2e6  # GPU: of the fastest clocks
FIRST_LEAD_MS, LEAD, MAX_LEAD_MS = 1.0, 1.5, 5.0  # GPU: how long it is held up before a call, times the host's time
# Relative RMS error that an implementation may have; far above rounding, far below a lost key or a wrong modality.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


# How the reason begins for which somebody who can run was not timed.
BROKEN = ("wrong", "failed")
LEFT_OUT = "left out of this case to save time"  # the reason of a row that other cases have
# Marks, as extra, what is no peer: a plain copy, a sort.  It does less than the problem asks, and bounds it.
YARDSTICK = {"yardstick": True}
# Marks, as extra, who makes its mask anew in each call.  Such rows are measured by one another, not by who keeps it.
MAKES_MASK = {"makes_mask": True}


@dataclass(frozen=True)
class Implementation:
    """One way to solve a problem.

    forward      computes the result; what is timed as "fwd" (without autograd) or, whole, as "step"
    leaves       tensors whose gradients "bwd" computes, in the problem's order; "fwd+bwd" times both as one
    grad_output  gradient of the result
    packed       brings the result or a leaf's gradient into the oracle's form (a padded peer drops its padding);
                 not timed
    extra        facts for the row, such as pairs computed over pairs visible
    directions   which of the problem's directions it takes part in
    work         of one call, where it is not the problem's (batches of other samples)
    """

    name: str
    forward: Callable[[], Any]
    leaves: Sequence[Tensor] = ()
    grad_output: Tensor | None = None
    packed: Callable[[Any], Any] = lambda result: result
    extra: dict[str, Any] = field(default_factory=dict)
    directions: tuple[str, ...] = ("fwd", "bwd", "fwd+bwd")
    work: Work | None = None


@dataclass(frozen=True)
class Missing:
    """An implementation that cannot run here, and why; directions as of an implementation."""

    name: str
    reason: str
    directions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Work:
    """amount per call; a row's rate is amount / seconds / 10**exponent, in unit; limit names an entry of limits.

    Where the rate is in another unit than the limit, limit_amount is what a call takes in the limit's.
    """

    amount: float
    unit: str
    exponent: int
    limit: str | None
    limit_amount: float | None = None


class Problem(Protocol):
    op: str
    case: str
    dtype: str
    directions: tuple[str, ...]

    def implementations(self) -> Iterable[Implementation | Missing]: ...
    def check(self, direction: str, results: list) -> str | None:
        """What is wrong with the results (one for fwd, else one gradient per leaf), or None."""

    def work(self, direction: str) -> Work: ...


@dataclass(frozen=True)
class Deferred:
    """A problem that is built when its turn comes, where drawing the inputs of all would take memory and time."""

    op: str
    case: str
    dtype: str
    directions: tuple[str, ...]
    build: Callable[[], Problem]


def makes_mask(row: dict) -> bool:
    return row.get("extra", {}).get("makes_mask", False)


def built(problem: Problem | Deferred) -> Problem:
    return problem.build() if isinstance(problem, Deferred) else problem


def run_problem(
    problem: Problem, limits: dict, seconds: float, device: torch.device, deadline: float = math.inf
) -> Iterator[dict]:
    """Rows of one problem: skipped ones first, then timed ones.  Spends about `seconds` per direction on timing.

    Who has not been checked by the deadline (of time.perf_counter) is skipped: checks may take longer than timing.
    """
    implementations = list(problem.implementations())
    for direction in problem.directions:
        calls, timed, first = {}, {}, {}
        for implementation in implementations:
            call = None
            if direction not in (implementation.directions or problem.directions):
                continue
            if isinstance(implementation, Missing):
                reason = implementation.reason
            elif time.perf_counter() > deadline:
                reason = "the time budget was spent before it was checked"
            else:
                begin = time.perf_counter()
                call, reason = checked_call(problem, implementation, direction)
                first[implementation.name] = time.perf_counter() - begin
            if reason is not None:
                yield identity(problem, direction, implementation.name) | {"skipped": reason}
            else:
                calls[implementation.name], timed[implementation.name] = call, implementation
        call = None  # or the last one's memory would stay where it fails
        least = MIN_STEP_ROUNDS if direction == "step" else MIN_SLOW_ROUNDS
        samples, host, failed = _timed(calls, seconds, device, least, direction)
        for name, reason in failed.items():
            del timed[name]
            yield identity(problem, direction, name) | {"skipped": reason}
        works = {name: i.work or problem.work(direction) for name, i in timed.items()}
        for name, implementation in timed.items():
            extra = implementation.extra
            if name in host:
                extra = extra | {"host_ms": round(statistics.median(host[name]), 4)}
            if device.type == "cuda":  # where kernels are compiled when they are first called
                extra = extra | {"first_call_s": round(first[name], 2)}
            yield _row(problem, direction, name, samples, limits, works, extra)


class Failed(Exception):
    """A call that passed its check, and raised when it was timed, where memory is short say."""

    def __init__(self, name, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Failed(name, f"failed: {in_a_line(error)}") from error


def _timed(calls: dict[str, Callable], seconds: float, device: torch.device, least: int, direction: str):
    """(samples, milliseconds of the host, {name: reason}).  Who fails leaves the calls; the others are timed anew."""
    failed: dict[str, str] = {}
    while True:
        host: dict[str, list[float]] = {}
        try:
            with grad_mode(direction):
                return time_calls(calls, seconds, device, slow_rounds=least, host=host), host, failed
        except Failed as failure:
            failed[failure.name] = failure.reason
            del calls[failure.name]  # with the graph that its backward holds


def close(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float | None = None) -> str | None:
    """None where every result is within tolerance (relative RMS, by dtype) of expected, else what is wrong."""
    for index, (result, reference) in enumerate(zip(results, expected, strict=True)):
        if result.shape != reference.shape:
            return f"wrong: result {index} has shape {tuple(result.shape)}, expected {tuple(reference.shape)}"
        allowed = TOLERANCE[result.dtype] if tolerance is None else tolerance
        reference = reference.double()
        size = reference.square().mean().sqrt().clamp_min(1e-30)
        error = float((result.double() - reference).square().mean().sqrt() / size) if reference.numel() else 0.0
        if not error <= allowed:  # also catches NaN
            return f"wrong: result {index} has relative error {error:.1e}, allowed {allowed:.0e}"
    return None


def time_calls(
    calls: dict[str, Callable],
    seconds: float,
    device: torch.device,
    *,
    slow_rounds: int = MIN_SLOW_ROUNDS,
    host: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each call, sampled in turns: everybody is first in turn and follows everybody else.

    On a CPU calls that do not count come before each sample, since who was before leaves caches and the allocator as it
    does: after the gradient of pad_sequence the next two calls, whosever they are, took 0.5 and 6 ms instead of 0.1.

    slow_rounds: samples of who takes all the time.  host: on a GPU filled with the milliseconds in which each call
    returned, unless it waits for the GPU itself; the samples are the GPU's own time.  Raises Failed where a call does.
    """
    if not calls:
        return {}
    sample = _sample_cuda(device, {} if host is None else host) if device.type == "cuda" else _sample_cpu
    warm = {}
    for name, call in calls.items():
        with _named(name):
            warm[name] = warm_up(call, device)
    repeats = {name: repeats_of(milliseconds, device) for name, milliseconds in warm.items()}
    short = {name for name in calls if device.type == "cpu" and warm[name] < LONG_MS}
    uncounted = {name: max(UNCOUNTED, repeats[name]) if name in short else 0 for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start, allowance = time.perf_counter(), 1e3 * max(seconds, SLOW_SECONDS)
    for round_index in range(MAX_ROUNDS):
        late = time.perf_counter() - start > seconds
        if round_index >= MIN_ROUNDS and late:
            break
        if round_index and round_index % SETTLED_EVERY == 0 and all(notch(s) < SETTLED for s in samples.values()):
            break
        # A call that has used up all the time by itself sits out the rest, lest one slow peer starve later cases.
        names = [
            n for n, s in samples.items() if len(s) < slow_rounds or sum(s) * (repeats[n] + uncounted[n]) < allowance
        ]
        for name, milliseconds in sample([(n, calls[n], repeats[n], uncounted[n]) for n in _turns(names, round_index)]):
            samples[name].append(milliseconds)
    return samples


def _turns(names: list[str], round_index: int) -> list[str]:
    """Who is first goes round; the others follow in an order that is drawn, the same in every run."""
    if not names:
        return []
    first = names[round_index % len(names)]
    rest = [name for name in names if name != first]
    return [first, *random.Random(round_index).sample(rest, len(rest))]


def notch(samples: Sequence[float]) -> float:
    """Half of the 95 % interval of the median over the median (McGill, Tukey and Larsen): 1.57 IQR / sqrt(n)."""
    if len(samples) < 2:
        return float("inf")
    quarters = statistics.quantiles(samples, n=4)
    return 1.57 * (quarters[2] - quarters[0]) / math.sqrt(len(samples)) / statistics.median(samples)


def may_be_equal(row: dict, other: dict) -> bool:
    """Whether the intervals of two rows' medians cover the difference of their rates."""
    uncertain = math.hypot(notch(row["samples_ms"]), notch(other["samples_ms"]))
    return abs(math.log(row["rate"] / other["rate"])) < uncertain


def warm_up(call: Callable, device: torch.device) -> float:
    """Calls until compilation, allocator and caches are warm; returns the milliseconds of the last."""
    milliseconds = 0.0
    for _ in range(2):
        if milliseconds > SLOW_MS:
            break
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        milliseconds = 1e3 * (time.perf_counter() - start)
    return milliseconds


def repeats_of(milliseconds: float, device: torch.device) -> int:
    """How many calls of that length make one sample."""
    return 1 if device.type == "cuda" else max(1, round(MIN_SAMPLE_MS / max(milliseconds, 1e-3)))


def _sample_cpu(round_calls) -> Iterator[tuple[str, float]]:
    for name, call, repeats, uncounted in round_calls:
        with _named(name):
            for _ in range(uncounted):
                call()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            took = time.perf_counter() - start
        yield name, 1e3 * took / repeats


def _sample_cuda(device: torch.device, host: dict[str, list[float]]):
    # Twice the L2: writing it evicts the inputs.
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(2 * l2, 64 << 20), dtype=torch.int8, device=device)
    leads: dict[str, float] = {}

    def sample(round_calls) -> Iterator[tuple[str, float]]:
        events = []
        for name, call, *_ in round_calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            # The GPU is held up until the host has asked for all of the call: the time between the events is that of
            # its kernels.  What the host takes is a figure of its own, and counts where nothing else keeps a GPU busy.
            lead = leads.get(name, FIRST_LEAD_MS)
            torch.cuda._sleep(int(lead * CYCLES_PER_MS))
            with _named(name):
                start.record()
                begin = time.perf_counter()
                call()
                returned = 1e3 * (time.perf_counter() - begin)
            end.record()
            leads[name] = min(LEAD * returned, MAX_LEAD_MS)
            if returned < lead:  # else it may have waited for the GPU, which was held up
                host.setdefault(name, []).append(returned)
            events.append((name, start, end))
        torch.cuda.synchronize(device)
        for name, start, end in events:
            yield name, start.elapsed_time(end)

    return sample


def checked_call(problem: Problem, implementation: Implementation, direction: str):
    """(call to time, None) or (None, why it is not timed)."""
    try:
        call = _call(implementation, direction)
        with grad_mode(direction):
            results = call()
        results = [implementation.packed(r) for r in ([results] if direction in ("fwd", "step") else results)]
        reason = problem.check(direction, results)
    except Exception as error:  # a peer that fails must not end the run; its row says why
        return None, f"failed: {in_a_line(error)}"
    return (None, reason) if reason is not None else (call, None)


def in_a_line(error: Exception) -> str:
    """Its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def grad_mode(direction: str) -> torch.set_grad_enabled:
    """What a direction's calls run under.  Entered around all of them: it takes as long as a short call."""
    return torch.set_grad_enabled(direction != "fwd")


def _call(implementation: Implementation, direction: str) -> Callable[[], Any]:
    if direction in ("fwd", "step"):  # step: a whole training step, backward and all
        return implementation.forward
    leaves, grad_output = tuple(implementation.leaves), implementation.grad_output
    if direction == "fwd+bwd":
        return lambda: torch.autograd.grad(implementation.forward(), leaves, grad_output)
    with torch.enable_grad():
        output = implementation.forward()
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


def _row(problem: Problem, direction: str, name: str, samples: dict, limits: dict, works: dict, extra: dict) -> dict:
    median = statistics.median(samples[name])
    quarters = statistics.quantiles(samples[name], n=4)
    work = works[name]
    rate = work.amount / (median * 1e-3) / 10**work.exponent
    limit = limits.get(work.limit) if work.limit else None
    reached = rate if work.limit_amount is None else work.limit_amount / (median * 1e-3)
    # by rate: of one problem's implementations some may be timed on other batches
    rates = {other: works[other].amount / statistics.median(s) for other, s in samples.items()}
    row = identity(problem, direction, name) | {
        "median_ms": median,
        "spread": (quarters[2] - quarters[0]) / median,
        "rate": rate,
        "rate_unit": work.unit,
        "percent_of_limit": 100 * reached / limit["value"] if limit else None,
        "speedup_over": {other: rates[name] / rate for other, rate in rates.items() if other != name},
        "checked": True,
        "samples_ms": [round(s, 5) for s in samples[name]],
    }
    if extra:
        row["extra"] = extra
    return row


def identity(problem: Problem | Deferred, direction: str, name: str) -> dict:
    """What a row is of, as schema.IDENTITY has it.  name: of the implementation, or "all"."""
    return {"op": problem.op, "case": problem.case, "direction": direction, "dtype": problem.dtype, "impl": name}

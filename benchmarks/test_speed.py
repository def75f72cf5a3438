"""Speed of what `auto` takes on every case, for regression tracking: pytest benchmarks --benchmark-json new.json.

Checked against the reference before it is timed, and failed where it is wrong.  Before and after each, a calibration
runs, whose samples go into extra_info: `python -m benchmarks compare` measures by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import harness, run

SECONDS = 0.3  # of timing, per test
MAX_ROUNDS = 100
CALIBRATIONS = 10  # before, and again after


class Feed:
    """Builds the problems of an operator one after another, as the tests ask; keeps only the present one."""

    def __init__(self) -> None:
        self.key, self.index, self.problem, self.rest = None, -1, None, iter(())

    def get(self, op: str, device: torch.device, shapes: str, index: int):
        key = op, device, shapes
        if key != self.key or index < self.index:
            self.key, self.index, self.rest = key, -1, iter(run.load(op).problems(shapes, device, 0))
        while self.index < index:
            self.problem, self.index = next(self.rest), self.index + 1
        self.problem = harness.built(self.problem)
        return self.problem


FEED = Feed()


def test_speed(benchmark, op, device, shapes, index, direction):
    problem = FEED.get(op, device, shapes, index)
    implementation = ours(problem)
    assert direction in implementation.directions, f"{implementation.name} has no {direction}"
    call, wrong = harness.checked_call(problem, implementation, direction)
    assert wrong is None, wrong
    call = finished(call, device)
    with harness.grad_mode(direction):
        repeats = harness.repeats_of(harness.warm_up(call, device), device)
        start = time.perf_counter()
        call()
        rounds = min(max(int(SECONDS / repeats / (time.perf_counter() - start)), harness.MIN_ROUNDS), MAX_ROUNDS)
        benchmark.group = f"{op}: {problem.case} {direction}"
        calibration = calibrate(device)
        benchmark.pedantic(call, rounds=rounds, iterations=repeats)
    benchmark.extra_info |= harness.identity(problem, direction, implementation.name)
    benchmark.extra_info |= {"calibration_ms": calibration + calibrate(device), "torch": torch.__version__}


def ours(problem) -> harness.Implementation:
    """What `auto` takes; the first of ours where nothing is marked."""
    own = [i for i in problem.implementations() if i.name.startswith(harness.PREFIX)]
    able = [i for i in own if isinstance(i, harness.Implementation)]
    assert able, "; ".join(f"{i.name}: {i.reason}" for i in own)  # `auto` itself raises then
    return next((i for i in able if i.extra.get("auto")), able[0])


def finished(call: Callable, device: torch.device) -> Callable:
    """call, until the device is done with it."""
    if device.type != "cuda":
        return call

    def both():
        call()
        torch.cuda.synchronize(device)

    return both


def calibrate(device: torch.device) -> list[float]:
    """Milliseconds of a product and a copy, about 1 ms each on a CPU: what the machine is worth at this moment."""
    side = 384 if device.type == "cpu" else 4096
    a = torch.ones(side, side, device=device)
    source = torch.ones(1 << (20 if device.type == "cpu" else 26), device=device)
    target = torch.empty_like(source)

    def work():
        torch.mm(a, a)
        target.copy_(source)

    call = finished(work, device)
    call()
    samples = []
    for _ in range(CALIBRATIONS):
        start = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples

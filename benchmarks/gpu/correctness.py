"""Correctness of the kernels on this device: values, gradients, isolation, repeatability, no hidden sync.

Every check raises AssertionError where it fails.  The oracle is the float64 reference; the measure is the error rule.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import modality_embed, packing
from benchmarks.gpu import attention_checks, parallel
from benchmarks.harness import PREFIX, Implementation, checked_call
from benchmarks.peers import modality_embed_eager
from mmkernels import dispatch, testing

REPEATS = 20
MANY = 64  # columns to judge a bias by: of 8 the ratio of two rms is luck, and broke the rule in two of ten draws
MOST_WORKERS = 14  # each has a context of half a GiB on the device
OPS = ("attention", "modality_embed", "packing")


@dataclass(frozen=True)
class Scope:
    """How much is checked.  A dry run touches every kind of check once, on the CPU's own implementations."""

    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    head_dims: tuple[int, ...] = (64, 128, 32, 96, 80, 256)
    widths: tuple[int, ...] = (768, 8, 100, 1024)
    longest: int = 300
    repeats: int = REPEATS


DRY = Scope(("fp32", "bf16"), (32,), (24,), 24, 3)


def run(
    device: torch.device,
    seconds: float,
    *,
    dry_run: bool = False,
    passed: Iterable[dict] = (),
    workers: int | None = None,
) -> dict:
    """{"green", "green_ops", "passed", "failed", "not_run", "checks": [{"name", "ok", "message", "seconds"}]}.

    Green means that all passed and none was left out; green_ops says it by operator.  passed: of an earlier run, which
    are not run again.  workers: processes that share the work (None: by the machine), since most of the time goes into
    compiling kernels, one thread each.
    """
    scope = DRY if dry_run else Scope()
    known = {check["name"]: check for check in passed}
    names = [name for name, _ in all_checks(device, scope)]
    wanted = [name for name in names if name not in known]
    if workers is None:
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2)) if device.type == "cuda" else 1
    deadline = time.time() + seconds
    if workers > 1:
        checks = parallel.run(functools.partial(run_some, device, scope, deadline), _groups(wanted), workers, deadline)
    else:
        checks = run_some(device, scope, deadline, wanted)
    done = known | {check["name"]: check for check in checks}
    checks = [done[name] for name in names if name in done]
    not_run = [name for name in names if name not in done]
    failed = [check["name"] for check in checks if not check["ok"]]
    right = len(checks) - len(failed)
    print(f"  {right} passed, {len(failed)} failed, {len(not_run)} not run for lack of time", flush=True)
    green = {op: not any(name.startswith(op) for name in (*failed, *not_run)) for op in OPS}
    return {
        "green": all(green.values()),
        "green_ops": green,
        "passed": right,
        "failed": len(failed),
        "not_run": not_run,
        "checks": checks,
    }


def run_some(device: torch.device, scope: Scope, deadline: float, wanted: list[str]) -> list[dict]:
    """Runs the checks of these names until the deadline (of time.time), or until one breaks the device for the rest."""
    if parallel.broken(device):
        return []
    left, checks = set(wanted), []
    for name, check in all_checks(device, scope):
        if name not in left:
            continue
        if time.time() > deadline:
            break
        start, message = time.perf_counter(), ""
        try:
            check()
        except Exception as error:  # one broken kernel must not hide the state of the others
            message = f"{type(error).__name__}: {error}"[:500]
            print(f"  FAILED {name}: {message}", flush=True)
        checks.append({"name": name, "ok": not message, "message": message, "seconds": time.perf_counter() - start})
        if parallel.broken(device):
            break
    return checks


def _groups(names: list[str]) -> list[list[str]]:
    """Checks of one call stand together: they share compiled kernels."""
    return [list(group) for _, group in itertools.groupby(names, lambda name: name.split(": ")[0])]


def all_checks(device: torch.device, scope: Scope) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) in order of worth: the widths and types that models use come first."""
    impl = "triton" if device.type == "cuda" else "auto"
    yield from attention_checks.all_checks(device, scope.dtypes, scope.head_dims, scope.longest, scope.repeats, impl)
    for width, dtype, form in itertools.product(scope.widths, scope.dtypes, ("full", "plain")):
        build = functools.cache(functools.partial(_embed, form, width, dtype, device))  # when its turn comes, once
        name = f"modality_embed {dtype} E{width} {form}"
        draws = range(max(1, MANY // width))
        yield f"{name}: error rule", lambda b=build, draws=draws: check_error_rule([b(draw) for draw in draws])
        yield f"{name}: repeats", lambda b=build: check_repeats(b(), scope.repeats)
        yield f"{name}: no sync", lambda b=build: check_no_sync(b())
        yield f"{name}: graph", lambda b=build: check_graph(b())
    for function, dtype in itertools.product(packing.FUNCTIONS, scope.dtypes):
        build = functools.cache(functools.partial(_packing, function, scope.widths[0], dtype, device))
        yield f"packing {dtype} {function}: error rule", lambda b=build: check_moves(b())
        yield f"packing {dtype} {function}: no sync", lambda b=build: check_moves_no_sync(b())


def _embed(form, width, dtype, device, draw=0):
    return modality_embed.build(form, "stamps", 6, width, dtype, device, seed=width + 10_000 * draw)


def _packing(function, width, dtype, device):
    return packing.build(function, "stamps", 6, width, dtype, device, seed=0)


def check_moves(problem) -> None:
    """Values and gradients of each implementation that can run: bit for bit where rows only move."""
    able = [i for i in problem.implementations() if i.name.startswith(PREFIX) and isinstance(i, Implementation)]
    assert able, f"no implementation of packing can run on {problem.packed.device}"
    for implementation in able:
        for direction in problem.directions:
            with testing.poisoned_empty():
                _, wrong = checked_call(problem, implementation, direction)
            assert wrong is None, f"{implementation.name} {direction}: {wrong}"


def check_graph(problem) -> None:
    """A captured graph of forward and backward gives, replayed, what the same call gives eagerly."""
    implementation = kernel(problem)
    eager = [x.clone() for x in solve(implementation)]
    replay = attention_checks.captured(lambda: solve(implementation), problem.grad_output.device)
    for index, (a, b) in enumerate(zip(replay(), eager, strict=True)):
        assert torch.equal(a, b), f"result {index} of a replay differs from the eager call"


def check_error_rule(problems: list) -> None:
    """Values and gradients under the error rule, in memory that was NaN before; all problems' judged together."""
    ours, torchs, expected = [], [], []
    for problem in problems:
        with testing.poisoned_empty():
            ours.append(solve(kernel(problem)))
        torchs.append(solve(modality_embed_eager.build(problem)))
        expected.append(problem.oracle())
    for index, results in enumerate(zip(*(_joined(solved) for solved in (ours, expected, torchs)), strict=True)):
        testing.assert_error_rule(f"gradient {index - 1}" if index else "output", *results)


def _joined(solved: list[list[Tensor]]) -> list[Tensor]:
    """Each result of all problems as one vector."""
    return [torch.cat([x.flatten() for x in same]) for same in zip(*solved, strict=True)]


def check_repeats(problem, repeats: int) -> None:
    """Bit-equal output and gradients over repeats of the same call."""
    implementation = kernel(problem)
    first = None
    for repeat in range(repeats):
        now = solve(implementation)
        first = first or now
        equal = [torch.equal(a, b) for a, b in zip(first, now, strict=True)]
        assert all(equal), f"repeat {repeat} differs from the first in result {equal.index(False)}"


def check_no_sync(problem) -> None:
    """Neither forward nor backward waits for the device, also when layout and mask are new."""
    solve(kernel(problem))  # compiles
    fresh = kernel(problem.with_new_layout())
    with attention_checks.sync_is_error(problem.grad_output.device):
        solve(fresh)


def check_moves_no_sync(problem) -> None:
    """The same for packing, whose forward alone is all there is of some functions."""
    device = problem.packed.device
    impl = dispatch.resolve("packing", "auto", device=device, dtype=problem.packed.dtype)
    fresh = replace(problem, layout=copy.copy(problem.layout.host).to(device))
    forward_only = problem.function in packing.FORWARD_ONLY
    for call, quiet in ((problem.call(impl), False), (fresh.call(impl), True)):
        with attention_checks.sync_is_error(device) if quiet else contextlib.nullcontext():
            if forward_only:
                with torch.no_grad():
                    call()
            else:
                torch.autograd.grad(call(), problem.leaves, problem.grad_output)


def kernel(problem) -> Implementation:
    """The Triton kernel on a GPU, what `auto` takes on a CPU.  Raises where a GPU would get anything but Triton."""
    device, dtype = problem.grad_output.device, problem.grad_output.dtype
    wanted = "triton" if device.type == "cuda" else dispatch.resolve(problem.op, "auto", device=device, dtype=dtype)
    for implementation in problem.implementations():
        if implementation.name == PREFIX + wanted:
            if not isinstance(implementation, Implementation):
                raise RuntimeError(f"{implementation.name} cannot run: {implementation.reason}")
            return implementation
    raise RuntimeError(f"{problem.op}: {wanted} is not among the problem's implementations")


def solve(implementation: Implementation) -> list[Tensor]:
    """Output, and gradients of the leaves."""
    output = implementation.forward()
    return [output.detach(), *torch.autograd.grad(output, tuple(implementation.leaves), implementation.grad_output)]

"""Correctness of the kernels on this device: values, gradients, isolation, repeatability, no hidden sync.

Every check raises AssertionError where it fails.  The oracle is the float64 reference; the measure is the error rule.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import modality_embed
from benchmarks.gpu import attention_checks
from benchmarks.harness import PREFIX, Implementation
from benchmarks.peers import modality_embed_eager
from mmkernels import dispatch, testing

REPEATS = 20


@dataclass(frozen=True)
class Scope:
    """How much is checked.  A dry run touches every kind of check once, on the CPU's own implementations."""

    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    head_dims: tuple[int, ...] = (64, 128, 32, 96, 80, 256)
    widths: tuple[int, ...] = (768, 8, 100, 1024)
    longest: int = 300
    repeats: int = REPEATS


DRY = Scope(("fp32", "bf16"), (32,), (24,), 24, 3)


def run(device: torch.device, seconds: float, *, dry_run: bool = False) -> dict:
    """{"green", "complete", "passed", "failed", "not_run", "checks": [{"name", "ok", "message", "seconds"}]}.

    Green means that all passed and none was left out.
    """
    deadline = time.perf_counter() + seconds
    checks, not_run = [], []
    for name, check in all_checks(device, DRY if dry_run else Scope()):
        if time.perf_counter() > deadline:
            not_run.append(name)
            continue
        start, message = time.perf_counter(), ""
        try:
            check()
        except Exception as error:  # one broken kernel must not hide the state of the others
            message = f"{type(error).__name__}: {error}"[:500]
            print(f"  FAILED {name}: {message}", flush=True)
        checks.append({"name": name, "ok": not message, "message": message, "seconds": time.perf_counter() - start})
    failed = sum(1 for c in checks if not c["ok"])
    print(f"  {len(checks) - failed} passed, {failed} failed, {len(not_run)} not run for lack of time", flush=True)
    return {
        "green": bool(checks) and not failed and not not_run,
        "complete": not not_run,
        "passed": len(checks) - failed,
        "failed": failed,
        "not_run": not_run,
        "checks": checks,
    }


def all_checks(device: torch.device, scope: Scope) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) in order of worth: the widths and types that models use come first."""
    impl = "triton" if device.type == "cuda" else "auto"
    yield from attention_checks.all_checks(device, scope.dtypes, scope.head_dims, scope.longest, scope.repeats, impl)
    for width, dtype, form in itertools.product(scope.widths, scope.dtypes, ("full", "plain")):
        problem = modality_embed.build(form, "stamps", 6, width, dtype, device, seed=width)
        name = f"modality_embed {dtype} E{width} {form}"
        yield f"{name}: error rule", lambda p=problem: check_error_rule(p)
        yield f"{name}: repeats", lambda p=problem: check_repeats(p, scope.repeats)
        yield f"{name}: no sync", lambda p=problem: check_no_sync(p)


def check_error_rule(problem) -> None:
    """Values and gradients under the error rule, in memory that was NaN before."""
    with testing.poisoned_empty():
        output, gradients = solve(kernel(problem))
    torch_output, torch_gradients = solve(modality_embed_eager.build(problem))
    expected = problem.oracle()
    named = ["output", *(f"gradient {i}" for i in range(len(gradients)))]
    for name, ours, ref, same in zip(
        named, [output, *gradients], expected, [torch_output, *torch_gradients], strict=True
    ):
        testing.assert_error_rule(name, ours, ref, same)


def check_repeats(problem, repeats: int) -> None:
    """Bit-equal output and gradients over repeats of the same call."""
    implementation = kernel(problem)
    first = None
    for repeat in range(repeats):
        output, gradients = solve(implementation)
        now = [output, *gradients]
        first = first or now
        equal = [torch.equal(a, b) for a, b in zip(first, now, strict=True)]
        assert all(equal), f"repeat {repeat} differs from the first in result {equal.index(False)}"


def check_no_sync(problem) -> None:
    """Neither forward nor backward waits for the device, also when layout and mask are new."""
    solve(kernel(problem))  # compiles
    fresh = kernel(problem.with_new_layout())
    with attention_checks.sync_is_error(problem.grad_output.device):
        solve(fresh)


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


def solve(implementation: Implementation) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(output, gradients of the leaves)."""
    output = implementation.forward()
    gradients = torch.autograd.grad(output, tuple(implementation.leaves), implementation.grad_output)
    return output.detach(), gradients

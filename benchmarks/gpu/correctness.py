"""Correctness of the kernels on this device: values, gradients, isolation, repeatability, no hidden sync.

Every check raises AssertionError where it fails.  The oracle is the float64 reference; the measure is the error rule.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import attention, modality_embed
from benchmarks.harness import PREFIX, Implementation
from benchmarks.limits import DTYPES
from benchmarks.peers import attention_sdpa_loop, modality_embed_eager
from mmkernels import dispatch, testing
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask

REPEATS = 20


@dataclass(frozen=True)
class Scope:
    """How much is checked.  A dry run touches every kind of check once, on the CPU's own implementations."""

    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    head_dims: tuple[int, ...] = (64, 128, 32, 96, 256)
    widths: tuple[int, ...] = (768, 8, 100, 1024)
    layouts: int = 3
    longest: int = 300
    repeats: int = REPEATS


DRY = Scope(("fp32", "bf16"), (32,), (24,), 1, 24, 3)

MASKS = {
    "full": lambda layout: None,
    "causal": lambda layout: AttentionMask(causal=True),
    "isolated": lambda layout: AttentionMask.isolated(layout.num_modalities),
    "window": lambda layout: AttentionMask(causal=True, window=(37, -1)),
    "prefix": lambda layout: AttentionMask(causal=True, prefix=(5,) * layout.num_samples),
    "bidirectional": lambda layout: AttentionMask(causal=True, bidirectional=(1,), visible=_one_way(layout)),
}


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
    for D, dtype, mask in itertools.product(scope.head_dims, scope.dtypes, MASKS):
        for seed in range(scope.layouts):
            problem = _attention_problem(device, dtype, D, mask, seed, scope.longest)
            name = f"attention {dtype} D{D} {mask} layout {seed}"
            yield f"{name}: error rule", lambda p=problem: check_error_rule(p)
            if seed == 0 and mask in ("full", "bidirectional"):
                yield f"{name}: isolation", lambda p=problem: check_isolation(p)
                yield f"{name}: blind rows", lambda p=problem: check_blind_rows(p)
                yield f"{name}: repeats", lambda p=problem: check_repeats(p, scope.repeats)
                yield f"{name}: no sync", lambda p=problem: check_no_sync(p)
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
    torch_output, torch_gradients = solve(_torch_way(problem))
    expected = problem.oracle()
    named = ["output", *(f"gradient {i}" for i in range(len(gradients)))]
    for name, ours, ref, same in zip(
        named, [output, *gradients], expected, [torch_output, *torch_gradients], strict=True
    ):
        testing.assert_error_rule(name, ours, ref, same)


def check_isolation(problem) -> None:
    """NaN in every other sample leaves the first sample's output and gradients bit-equal."""
    stop = int(problem.layout.host.cu_seqlens[1])
    before, gradients = solve(kernel(problem))
    poisoned = [x.detach().clone() for x in (problem.q, problem.k, problem.v, problem.grad_output)]
    for x in poisoned:
        x[stop:] = float("nan")
    q, k, v, grad_output = poisoned
    leaves = [x.requires_grad_() for x in (q, k, v)]
    twin = replace(problem, q=leaves[0], k=leaves[1], v=leaves[2], grad_output=grad_output)
    after, poisoned_gradients = solve(kernel(twin))
    for name, a, b in zip("oqkv", [before, *gradients], [after, *poisoned_gradients], strict=True):
        assert torch.equal(a[:stop], b[:stop]), f"{name} of sample 0 changed when NaN came into other samples"


def check_blind_rows(problem: attention.AttentionProblem) -> None:
    """A query that may see nothing gives 0 and gets gradient 0; nobody else notices."""
    M = problem.layout.num_modalities
    seeing = [[query != 0 and key == query for key in range(M)] for query in range(M)]
    output, gradients = solve(kernel(replace(problem, mask=AttentionMask(visible=seeing))))
    blind = problem.layout.modality_ids == 0
    for name, result in zip("oqkv", [output, *gradients], strict=True):
        assert (result[blind] == 0).all(), f"{name} is not 0 where a query sees nothing, or nobody sees a key"
        assert torch.isfinite(result).all(), f"{name} is not finite"


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
    with _sync_is_error(problem.grad_output.device):
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


def _torch_way(problem) -> Implementation:
    """The best same-dtype PyTorch computation of the same thing, which the error rule measures ours by."""
    return (attention_sdpa_loop if problem.op == "attention" else modality_embed_eager).build(problem)


def _attention_problem(device, dtype: str, D: int, mask: str, seed: int, longest: int) -> attention.AttentionProblem:
    """Ragged, interleaved, with empty and one-token samples; grouped heads on odd seeds."""
    layout = testing.random_layout(seed, num_samples=6, max_length=longest).to(device)
    heads, kv_heads = 4, 2 if seed % 2 else 4
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(layout.total_tokens, count, D, generator=generator).to(device, DTYPES[dtype])

    q, k, v = (draw(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
    case = f"random {seed} {mask} H{heads} G{kv_heads} D{D}"
    return attention.AttentionProblem(case, dtype, layout, MASKS[mask](layout), q, k, v, draw(heads))


def _one_way(layout: PackedLayout) -> list[list[bool]]:
    """Modality m sees itself and those before it: rows with few visible keys, tiles with mixed bits."""
    return [[key <= query for key in range(layout.num_modalities)] for query in range(layout.num_modalities)]


@contextlib.contextmanager
def _sync_is_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Host time of one attention call, by part: checks and outputs, autograd, launch; and of lowering a fresh layout.

A batch so small that its kernels take no time, called in a loop.  An implementation that does nothing stands in for
the real one to tell the operator's own cost from what the implementation adds: on a GPU the launch of its kernels, on
a CPU their work too.  All times are the shortest of many rounds, in turns: a host cost has no noise but upwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import attention, environment, workloads
from benchmarks.attention_cases import MASKS, Case
from mmkernels import dispatch
from mmkernels.masks import MaskPlan

CASE = Case("uniform", 4, heads=4, kv_heads=4, width=64, length=8)
LAYOUT_SAMPLES = 256
TILE = (128, 64)  # rows and columns of the tiles made for a fresh layout
CALLS = 10  # of one round
ROUNDS = 200


def _nothing(*inputs) -> None:
    """An implementation that does not compute."""


def _load_nothing(op: str, impl: str) -> SimpleNamespace:
    return NOTHING


NOTHING = SimpleNamespace(attention_fwd=_nothing, attention_bwd=_nothing, can_replay=lambda: False)


def run(device: torch.device, *, seed: int = 0) -> dict:
    """{"environment", "calls": [{"what", "us"}], "layout": [{"mask", "lower_us", "tiles_us"}]}; prints as it goes."""
    calls = call_times(device, ROUNDS, seed)
    print(f"attention, one call, {CASE.samples} samples of {CASE.length} tokens, H{CASE.heads} D{CASE.width}: us")
    for row in calls:
        print(f"  {row['us']:9.1f}  {row['what']}")
    layout = layout_times(max(3, ROUNDS // 10), seed)
    print(f"\na fresh layout of {LAYOUT_SAMPLES} stamps-like samples: us")
    for row in layout:
        print(f"  lower {row['lower_us']:8.1f}  tiles {row['tiles_us']:8.1f}  {row['mask']}")
    return {"environment": environment.describe(device, seed), "calls": calls, "layout": layout}


def call_times(device: torch.device, rounds: int, seed: int) -> list[dict]:
    problem = attention.from_case(_case(device), device, seed)
    q, k, v, grad = problem.q, problem.k, problem.v, problem.grad_output
    impl = dispatch.resolve("attention", "auto", device=device, dtype=q.dtype)
    padded = [x.detach().view(CASE.samples, CASE.length, *x.shape[1:]).transpose(1, 2).contiguous() for x in (q, k, v)]
    padded = [x.requires_grad_() for x in padded]
    padded_grad = torch.ones_like(padded[0])

    def ours():
        return attention.attention(q, k, v, layout=problem.layout)

    def sdpa():
        return F.scaled_dot_product_attention(*padded)

    for grad_enabled in (False, True):  # plans forward alone and both, which a stub cannot
        with torch.set_grad_enabled(grad_enabled):
            ours()

    def gradients(call, leaves, gradient):
        return lambda: torch.autograd.grad(call(), leaves, gradient)

    both, sdpa_both = gradients(ours, (q, k, v), grad), gradients(sdpa, padded, padded_grad)
    best = best_times(
        {
            "plain stub": (ours, False),
            "plain": (ours, False),
            "forward stub": (ours, True),
            "forward": (ours, True),
            "both stub": (both, True),
            "both": (both, True),
            "sdpa plain": (sdpa, False),
            "sdpa forward": (sdpa, True),
            "sdpa both": (sdpa_both, True),
        },
        rounds,
        device,
    )
    backward = best["both stub"] - best["forward stub"]
    parts = {
        f"forward, no gradient wanted (impl {impl})": best["plain"],
        "  checks, look-up, dispatcher and outputs": best["plain stub"],
        "  the implementation": best["plain"] - best["plain stub"],
        "forward, gradient wanted": best["forward"],
        "  of that, recording it": best["forward stub"] - best["plain stub"],
        "forward and backward": best["both"],
        "  of that, engine, dispatcher and gradients": backward,
        "  of that, the implementation's backward": best["both"] - best["forward"] - backward,
        "SDPA forward, no gradient wanted": best["sdpa plain"],
        "SDPA forward, gradient wanted": best["sdpa forward"],
        "SDPA forward and backward": best["sdpa both"],
    }
    return [{"what": what, "us": round(us, 2)} for what, us in parts.items()]


def layout_times(rounds: int, seed: int) -> list[dict]:
    """Lowering a mask on the host and making the tiles of forward and of dK/dV, on a layout that has met neither."""
    layout = workloads.stamps(LAYOUT_SAMPLES, seed)
    rows = []
    for name, make in MASKS.items():
        mask = make(layout)
        lower, tiles = [], []
        for _ in range(rounds):
            layout.cache.clear()
            start = time.perf_counter()
            plan = MaskPlan.lower(layout, mask)
            middle = time.perf_counter()
            for kind in ("query", "key"):
                plan.tiles(kind, *TILE)
            lower.append(middle - start)
            tiles.append(time.perf_counter() - middle)
        rows.append({"mask": name, "lower_us": round(1e6 * min(lower), 1), "tiles_us": round(1e6 * min(tiles), 1)})
    return rows


def best_times(calls: dict[str, tuple[Callable, bool]], rounds: int, device: torch.device) -> dict[str, float]:
    """Microseconds of each (call, whether gradients are on), the least of `rounds`, all in turns.

    "stub" in the name: with an implementation that does nothing.
    """
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, (call, grad) in calls.items():
            with without_implementation() if "stub" in name else nullcontext(), torch.set_grad_enabled(grad):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], 1e6 * (time.perf_counter() - start) / CALLS)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return best


def _case(device: torch.device) -> Case:
    return CASE if device.type == "cpu" else replace(CASE, dtype="bf16")


@contextmanager
def without_implementation() -> Iterator[None]:
    """Calls cost what they cost, and nothing is computed."""
    known = []  # which calls that were met before go to without `load`
    if dispatch.cpp_missing() is None:
        known.append(("cpp", "run_forward", "run_backward"))
    if torch.cuda.is_available() and dispatch.triton_version() is not None:
        known.append(("triton", "attention_fwd", "attention_bwd"))
    with ExitStack() as stack:
        for impl, *names in known:
            module = dispatch.load("attention", impl)
            for name in names:
                stack.enter_context(mock.patch.object(module, name, _nothing))
        stack.enter_context(mock.patch.object(dispatch, "load", _load_nothing))
        yield

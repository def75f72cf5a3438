"""What peers that take packed sequences share: which problems they can solve, and how they are called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from benchmarks.harness import Implementation
from mmkernels.masks import AttentionMask

HALF = (torch.bfloat16, torch.float16)
ALL_DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


def plain_mask(problem) -> str | None:
    """ "full" or "causal" where the mask is no more than that, else None."""
    if problem.mask in (None, AttentionMask()):
        return "full"
    return "causal" if problem.mask == AttentionMask(causal=True) else None


def missing(problem, module: str, dtypes=HALF) -> str | None:
    """Why a flash-like package cannot solve the problem: only full and causal, only on a GPU."""
    if problem.q.device.type != "cuda":
        return "runs on CUDA devices only"
    if problem.q.dtype not in dtypes:
        return f"takes {', '.join(str(t).removeprefix('torch.') for t in dtypes)}"
    if plain_mask(problem) is None:
        return "knows no such mask"
    return None if installed(module) else "not installed"


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is not there
        return False


def varlen(name: str, problem, call: Callable, directions=ALL_DIRECTIONS) -> Implementation:
    """call(q, k, v, cu_seqlens, longest, causal) on packed tensors."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    # Samples without tokens are left out: not every peer takes them.
    lengths = problem.layout.host.cu_seqlens.diff()
    bounds = torch.cat([lengths.new_zeros(1), lengths[lengths > 0].cumsum(0)]).to(q.device, torch.int32)
    longest, causal = int(lengths.max()), plain_mask(problem) == "causal"
    return Implementation(
        name,
        lambda: call(q, k, v, bounds, longest, causal),
        (q, k, v),
        problem.grad_output,
        directions=directions,
    )

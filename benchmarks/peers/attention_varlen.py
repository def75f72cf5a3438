"""torch.nn.attention.varlen.varlen_attn: flash attention over packed sequences, in the box since torch 2.10."""

from __future__ import annotations

import inspect

from benchmarks.harness import Implementation
from benchmarks.peers import packed

NAME = "varlen_attn"
MODULE = "torch.nn.attention.varlen"


def missing(problem) -> str | None:
    reason = packed.missing(problem, MODULE)
    if reason is None and _grouped(problem) and not _takes_groups():
        return "knows no grouped heads in this torch"
    return reason


def build(problem) -> Implementation:
    from torch.nn.attention.varlen import varlen_attn

    options = {"enable_gqa": True} if _grouped(problem) else {}

    def call(q, k, v, bounds, longest, causal):
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window, **options)

    return packed.varlen(NAME, problem, call)


def _grouped(problem) -> bool:
    return problem.q.shape[1] != problem.k.shape[1]


def _takes_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters

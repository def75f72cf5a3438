"""FlashAttention-3 by the fa3-fwd package: forward only, bf16, Hopper."""

from __future__ import annotations

import torch

from benchmarks.harness import Implementation
from benchmarks.peers import packed

NAME = "fa3_fwd"
MODULE = "fa3_fwd_interface"


def missing(problem) -> str | None:
    reason = packed.missing(problem, MODULE, (torch.bfloat16,))
    if reason is None and torch.cuda.get_device_capability(problem.q.device) != (9, 0):
        return "runs on sm_90 only"
    return reason


def build(problem) -> Implementation:
    from fa3_fwd_interface import flash_attn_varlen_func

    def call(q, k, v, bounds, longest, causal):
        found = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return packed.varlen(NAME, problem, call, directions=("fwd",))

"""FlashAttention-2 by the flash-attn package, where it has been built: its packed interface."""

from __future__ import annotations

from benchmarks.harness import Implementation
from benchmarks.peers import packed

NAME = "fa2"
MODULE = "flash_attn.flash_attn_interface"  # not flash_attn alone: flash-attn-4 has that name too


def missing(problem) -> str | None:
    return packed.missing(problem, MODULE)


def build(problem) -> Implementation:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    def call(q, k, v, bounds, longest, causal):
        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=causal)

    return packed.varlen(NAME, problem, call)

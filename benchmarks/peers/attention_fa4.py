"""FlashAttention-4 by the flash-attn-4 package (CuTe DSL): sm_90 and later."""

from __future__ import annotations

from benchmarks.harness import Implementation
from benchmarks.peers import packed

NAME = "fa4"
MODULE = "flash_attn.cute"


def missing(problem) -> str | None:
    return packed.missing(problem, MODULE)


def build(problem) -> Implementation:
    from flash_attn.cute import flash_attn_varlen_func

    def call(q, k, v, bounds, longest, causal):
        found = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest, causal=causal
        )
        return found[0] if isinstance(found, tuple) else found

    return packed.varlen(NAME, problem, call)

"""xformers memory_efficient_attention with a block-diagonal bias."""

from __future__ import annotations

from benchmarks.harness import Implementation
from benchmarks.peers import dense_masks, packed

NAME = "xformers"
MODULE = "xformers.ops"


def missing(problem) -> str | None:
    if problem.q.shape[1] != problem.k.shape[1]:
        return "grouped heads need another form of tensors there"
    return packed.missing(problem, MODULE)


def build(problem) -> Implementation:
    from xformers.ops import fmha, memory_efficient_attention

    lengths = [stop - start for start, stop in dense_masks.bounds(problem.plan)]
    kind = "BlockDiagonalCausalMask" if packed.plain_mask(problem) == "causal" else "BlockDiagonalMask"
    bias = getattr(fmha.attn_bias, kind).from_seqlens(lengths, device=problem.q.device)

    def call(q, k, v, bounds, longest, causal):
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

    return packed.varlen(NAME, problem, call)

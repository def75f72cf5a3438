"""A plain Python loop of torch SDPA, one call per sample on views of packed tensors.  Masks are built beforehand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation
from benchmarks.peers import dense_masks, packed

NAME = "sdpa_loop"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    q, k, v = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    samples, kind = dense_masks.bounds(problem.plan), packed.plain_mask(problem)
    masks = [None if kind else _mask(problem.plan, *sample, q.dtype) for sample in samples]
    grouped = q.shape[1] != k.shape[1]

    def forward():
        outputs = []
        for (start, stop), mask in zip(samples, masks, strict=True):
            one = [x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # [1, H, n, D]
            seen = F.scaled_dot_product_attention(*one, attn_mask=mask, is_causal=kind == "causal", enable_gqa=grouped)
            outputs.append(seen.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    lengths = [stop - start for start, stop in samples]
    computed = sum(n * (n + 1) // 2 if kind == "causal" else n * n for n in lengths)
    extra = {"pairs_computed_over_visible": computed / max(problem.plan.visible_pairs, 1)}
    return Implementation(NAME, forward, (q, k, v), problem.grad_output, extra=extra)


def _mask(plan, start: int, stop: int, dtype: torch.dtype):
    return dense_masks.additive(dense_masks.sample_mask(plan, start, stop), dtype)

"""A plain Python loop of torch SDPA, one call per sample on views of packed tensors.  Masks are built beforehand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation
from benchmarks.peers import dense_masks
from mmkernels.masks import AttentionMask

NAME = "sdpa_loop"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    q, k, v = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    samples = dense_masks.bounds(problem.plan)
    whole, causal = problem.mask in (None, AttentionMask()), problem.mask == AttentionMask(causal=True)
    masks = [None if whole or causal else dense_masks.sample_mask(problem.plan, *sample) for sample in samples]
    grouped = q.shape[1] != k.shape[1]

    def forward():
        outputs = []
        for (start, stop), mask in zip(samples, masks, strict=True):
            one = [x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # [1, H, n, D]
            seen = F.scaled_dot_product_attention(*one, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
            outputs.append(seen.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    computed = sum((stop - start) ** 2 for start, stop in samples) / max(problem.plan.visible_pairs, 1)
    return Implementation(
        NAME, forward, (q, k, v), problem.grad_output, extra={"pairs_computed_over_visible": computed}
    )

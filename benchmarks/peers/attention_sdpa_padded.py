"""torch SDPA on a batch padded to its longest sample, with a dense mask: what most training code does.

The batch is already padded and the mask already built when the clock starts: only SDPA is timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation
from benchmarks.peers import dense_masks

NAME = "sdpa_padded"
MAX_MASK_BYTES = 8 << 30


def missing(problem) -> str | None:
    _, samples, longest = dense_masks.padded_slots(problem.plan)
    size = samples * longest**2
    return f"its mask would take {size / 2**30:.0f} GiB" if size > MAX_MASK_BYTES else None


def build(problem) -> Implementation:
    slots, samples, longest = dense_masks.padded_slots(problem.plan)

    def pad(packed):  # [T, H, D] -> [B, H, L, D]
        rows = packed.new_zeros(samples * longest, *packed.shape[1:])
        rows[slots] = packed.detach()
        return rows.view(samples, longest, *packed.shape[1:]).transpose(1, 2).contiguous()

    q, k, v = (pad(x).requires_grad_() for x in (problem.q, problem.k, problem.v))
    mask = torch.zeros(samples, 1, longest, longest, dtype=torch.bool, device=q.device)
    for index, (start, stop) in enumerate(dense_masks.bounds(problem.plan)):
        mask[index, 0, : stop - start, : stop - start] = dense_masks.sample_mask(problem.plan, start, stop)
        mask[index, 0, stop - start :, 0] = True  # a padding row that sees nothing would give NaN
    grouped = q.shape[1] != k.shape[1]
    return Implementation(
        NAME,
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped),
        (q, k, v),
        pad(problem.grad_output),
        lambda result: result.transpose(1, 2).reshape(samples * longest, *result.transpose(1, 2).shape[2:])[slots],
        {"pairs_computed_over_visible": samples * longest**2 / max(problem.plan.visible_pairs, 1)},
    )

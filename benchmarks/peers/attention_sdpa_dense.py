"""torch SDPA on a padded batch with a dense mask [B, 1, L, L]: how any mask is had from torch.

The other form, one block-diagonal [T, T] mask over the packed batch, computes T^2 pairs, B times as many or more, and
is not timed.  Batch and mask are built before the clock starts.
"""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.harness import Implementation
from benchmarks.peers import dense_masks

NAME = "sdpa_dense"
MAX_MASK_BYTES = 8 << 30


def missing(problem) -> str | None:
    samples = dense_masks.bounds(problem.plan)
    size = len(samples) * max(stop - start for start, stop in samples) ** 2 * problem.q.element_size()
    return f"its mask would take {size / 2**30:.0f} GiB" if size > MAX_MASK_BYTES else None


def build(problem) -> Implementation:
    pad, unpad, slots = dense_masks.padding(problem.plan)
    q, k, v = (pad(x).requires_grad_() for x in (problem.q, problem.k, problem.v))
    mask = dense_masks.additive(dense_masks.padded_mask(problem.plan), q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return Implementation(
        NAME,
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped),
        (q, k, v),
        pad(problem.grad_output),
        unpad,
        {"pairs_computed_over_visible": slots * q.shape[2] / max(problem.plan.visible_pairs, 1)},
    )

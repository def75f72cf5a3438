"""torch SDPA on a batch padded to its longest sample, with the smallest mask that does: key padding, is_causal, none.

What most training code does where the mask allows it.  The batch is already padded and the mask already built when the
clock starts: only SDPA is timed.  Masks that need more are attention_sdpa_dense's.
"""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.harness import Implementation
from benchmarks.peers import dense_masks, packed

NAME = "sdpa_padded"


def missing(problem) -> str | None:
    return None if packed.plain_mask(problem) else "this mask needs a dense one: sdpa_dense"


def build(problem) -> Implementation:
    pad, unpad, slots = dense_masks.padding(problem.plan)
    q, k, v = (pad(x).requires_grad_() for x in (problem.q, problem.k, problem.v))
    options = {"enable_gqa": q.shape[1] != k.shape[1]}
    if packed.plain_mask(problem) == "causal":  # the padding is on the right, where causal rows do not look
        options["is_causal"] = True
    elif slots > problem.layout.total_tokens:  # else nothing is padded, and a mask would only cost time
        options["attn_mask"] = dense_masks.additive(dense_masks.key_padding(problem.plan), q.dtype)
    computed = slots * ((q.shape[2] + 1) / 2 if "is_causal" in options else q.shape[2])
    return Implementation(
        NAME,
        lambda: F.scaled_dot_product_attention(q, k, v, **options),
        (q, k, v),
        pad(problem.grad_output),
        unpad,
        {"pairs_computed_over_visible": computed / max(problem.plan.visible_pairs, 1)},
    )

"""Random masks, layouts as a GPU user has them, and what a plan lets through, for the tests of masks."""

import numpy as np
import torch

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask


def random_mask(rng, layout):
    """Any combination of the mask's parts that intervals can hold."""
    M = layout.num_modalities
    causal = bool(rng.integers(2))
    window = tuple(int(w) for w in rng.choice([-1, 0, 1, 3, 9], 2))
    scope = "all" if rng.integers(2) else "causal"
    prefix = None
    if causal and rng.integers(2) and not (scope == "causal" and window[0] >= 0):
        prefix = tuple(int(n) for n in rng.integers(0, 12, layout.num_samples))
    bidirectional = tuple(np.flatnonzero(rng.integers(0, 2, M))) if causal and rng.integers(2) else ()
    visible = rng.integers(0, 2, (M, M)).astype(bool) if rng.integers(2) else None
    return AttentionMask(causal, window, scope, prefix, bidirectional, visible)


def seen_by_plan(plan):
    token = torch.arange(plan.layout.total_tokens, dtype=torch.int32)
    inside = (token >= plan.kv_lo[:, None]) & (token < plan.kv_hi[:, None])
    by_key = (token[:, None] >= plan.q_lo) & (token[:, None] < plan.q_hi)
    assert torch.equal(inside, by_key)  # forward's and backward's bounds describe one set
    return inside & ((plan.q_bits[:, None] & plan.k_bits) != 0)


def device_bounds(layout):
    """The layout as a GPU user has it: bounds and modalities that must not be read."""
    return PackedLayout._from_device_bounds(
        layout.cu_seqlens, layout.total_tokens, layout.max_seqlen, layout.modality_ids, layout.num_modalities
    )


def merged(layout):
    """The layout with equal neighbours joined: what device-side bounds can tell."""
    return PackedLayout.from_cu_seqlens(
        layout.cu_seqlens,
        total_tokens=layout.total_tokens,
        max_seqlen=layout.max_seqlen,
        modality_ids=layout.modality_ids,
        num_modalities=layout.num_modalities,
    )

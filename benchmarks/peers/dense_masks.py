"""Dense boolean masks and padding for peers that know no packed batches.   B samples, L longest, T tokens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mmkernels.masks import MaskPlan


def sample_mask(plan: MaskPlan, start: int, stop: int) -> Tensor:
    """bool [n, n]: what the tokens of one sample, packed at [start, stop), see of each other."""
    columns = torch.arange(start, stop, device=plan.kv_lo.device)
    inside = (columns >= plan.kv_lo[start:stop, None]) & (columns < plan.kv_hi[start:stop, None])
    if not plan.has_visible:
        return inside
    return inside & ((plan.q_bits[start:stop, None] & plan.k_bits[None, start:stop]) != 0)


def bounds(plan: MaskPlan) -> list[tuple[int, int]]:
    """(start, stop) of each sample that has tokens."""
    edges = plan.layout.host.cu_seqlens.tolist()
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def padded_slots(plan: MaskPlan) -> tuple[Tensor, int, int]:
    """(int64 [T]: slot of each token in the flattened [B, L]; B; L)."""
    samples = bounds(plan)
    longest = max(stop - start for start, stop in samples)
    slots = [torch.arange(i * longest, i * longest + stop - start) for i, (start, stop) in enumerate(samples)]
    return torch.cat(slots).to(plan.kv_lo.device), len(samples), longest

"""Dense masks and padding for peers that know no packed batches.   B samples, L longest, T tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

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


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf elsewhere: what SDPA would make of a bool mask on every call."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def padded_mask(plan: MaskPlan) -> Tensor:
    """bool [B, 1, L, L].  A padding row sees key 0: one that sees nothing would give NaN."""
    samples = bounds(plan)
    longest = max(stop - start for start, stop in samples)
    seen = torch.zeros(len(samples), 1, longest, longest, dtype=torch.bool, device=plan.kv_lo.device)
    for index, (start, stop) in enumerate(samples):
        seen[index, 0, : stop - start, : stop - start] = sample_mask(plan, start, stop)
        seen[index, 0, stop - start :, 0] = True
    return seen


def key_padding(plan: MaskPlan) -> Tensor:
    """bool [B, 1, 1, L]: which slots hold a token."""
    lengths = torch.tensor([stop - start for start, stop in bounds(plan)], device=plan.kv_lo.device)
    return (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None])[:, None, None]


def bounds(plan: MaskPlan) -> list[tuple[int, int]]:
    """(start, stop) of each sample that has tokens."""
    edges = plan.layout.host.cu_seqlens.tolist()
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def padding(plan: MaskPlan) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]:
    """(pad: packed [T, H, D] to [B, H, L, D], zeros where nobody is; its inverse; slots B L)."""
    samples = bounds(plan)
    longest = max(stop - start for start, stop in samples)
    slots = torch.cat([torch.arange(i * longest, i * longest + b - a) for i, (a, b) in enumerate(samples)])
    slots = slots.to(plan.kv_lo.device)

    def pad(packed: Tensor) -> Tensor:
        rows = packed.new_zeros(len(samples) * longest, *packed.shape[1:])
        rows[slots] = packed.detach()
        return rows.view(len(samples), longest, *packed.shape[1:]).transpose(1, 2).contiguous()

    def unpad(padded: Tensor) -> Tensor:
        tokens = padded.transpose(1, 2)
        return tokens.reshape(-1, *tokens.shape[2:])[slots]

    return pad, unpad, len(samples) * longest

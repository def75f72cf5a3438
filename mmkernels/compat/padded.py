"""Attention on padded [B, H, L, D] tensors as views of packed ones.   H heads, G key heads, D width, Lq, Lk padded.

A padded batch is a packed one whose samples all have L tokens and whose mask hides the padding, so nothing is packed or
copied where the strides have one step from token to token: [B, L, H, D] memory seen as [B, H, L, D], which is what
projections give.  Contiguous [B, H, L, D] has no such step; there each head is taken for a sample of one head, without
copies too if H = G.  Only tensors that fit neither way, and mixtures, are copied.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels.compat.mask_reading import Bounds
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, KeyIntervals
from mmkernels.ops.attention.api import attention


class PaddedPlan(NamedTuple):
    """Layouts and mask of a padded batch.

    by_head  each head of each sample is a sample of the layouts
    plain    "full" or "causal" where torch has a kernel for it, None else and where only the device knows
    """

    layout: PackedLayout
    k_layout: PackedLayout | None
    mask: AttentionMask
    by_head: bool
    plain: str | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PaddedPlan,
    *,
    scale: float | None = None,
    dropout_p: float = 0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over the keys that the plan lets each query see.  q [B, H, Lq, D], k, v [B, G, Lk, D].

    Returns [B, H, Lq, D], in memory [B, Lq, H, D], or [B, H, Lq, D] if the plan goes by head; with return_lse also the
    natural logarithm of each softmax denominator, fp32 [B, H, Lq].
    """
    batch, heads, queries, width = q.shape
    result = attention(
        *(as_packed(t, plan.by_head) for t in (q, k, v)), layout=plan.layout, k_layout=plan.k_layout, mask=plan.mask,
        scale=scale, dropout_p=dropout_p, deterministic=deterministic, return_lse=return_lse, impl=impl,
    )  # fmt: skip
    out, lse = result if return_lse else (result, None)
    if plan.by_head:
        out = out.view(batch, heads, queries, width)
        return (out, lse.view(batch, heads, queries)) if return_lse else out
    out = out.view(batch, queries, heads, width).transpose(1, 2)
    return (out, lse.view(heads, batch, queries).transpose(0, 1)) if return_lse else out


def as_packed(t: Tensor, by_head: bool) -> Tensor:
    """[B, H, L, D] as [B L, H, D], or by head as [B H L, 1, D]; a view where the strides allow it."""
    return t.flatten(0, 2).unsqueeze(1) if by_head else t.transpose(1, 2).flatten(0, 1)


def goes_by_head(*tensors: Tensor) -> bool:
    """Whether [B, H, L, D] tensors are better taken head by head: all can be so without a copy, and not otherwise."""
    if all(t.shape[0] == 1 or t.stride(0) == t.shape[2] * t.stride(2) for t in tensors):
        return False
    return len({t.shape[1] for t in tensors}) == 1 and all(map(_has_head_stride, tensors))


def _has_head_stride(t: Tensor) -> bool:
    batch, heads, length, _ = t.shape
    return (heads == 1 or t.stride(1) == length * t.stride(2)) and (batch == 1 or t.stride(0) == heads * t.stride(1))


def plan_bounds(bounds: Bounds, samples: int, queries: int, keys: int, device: torch.device, by_head: bool):
    """The plan of a batch whose mask is known on the host.  Bounds of one sample are for all, of B for all heads."""

    def spread(part: np.ndarray, length: int) -> np.ndarray:
        """[n, L or 1] as [samples, L]"""
        repeated = part if part.shape[0] in (1, samples) else np.repeat(part, samples // part.shape[0], 0)
        return np.ascontiguousarray(np.broadcast_to(repeated, (samples, length)))

    intervals = KeyIntervals(*(spread(part, queries).reshape(-1) for part in (bounds.lo, bounds.hi)))
    plain = bounds.plain(keys)
    if bounds.hidden is None and bounds.blind is None:
        return _plan(samples, queries, keys, device, intervals, by_head, plain)
    # Modality 1 marks queries that see nothing, 2 keys that nobody sees, 3 both: the mask's bits do the rest.
    blind, hidden = np.zeros((samples, queries), np.uint8), np.zeros((samples, keys), np.uint8)
    if bounds.blind is not None:
        blind |= spread(bounds.blind, queries)
    if bounds.hidden is not None:
        hidden |= spread(bounds.hidden, keys).view(np.uint8) << 1
    visible = tuple(tuple(not q & 1 and not k & 2 for k in range(4)) for q in range(4))
    mask = AttentionMask(intervals=intervals, visible=visible)
    if queries == keys:
        layout, k_layout = _marked(blind | hidden), None
    else:
        layout, k_layout = _marked(blind), _marked(hidden).to(device)
    return PaddedPlan(layout.to(device), k_layout, mask, by_head, plain)


def plan_device_bounds(
    lo: Tensor, hi: Tensor, samples: int, keys: int, by_head: bool, hidden: Tensor | None = None
) -> PaddedPlan:
    """The plan of bounds [B or 1, Lq] and hidden keys, bool [B, Lk], that must not be read."""
    queries, device = lo.shape[1], lo.device

    def spread(part: Tensor) -> Tensor:
        # A copy: a view of the lengths would keep them alive, and so what is kept by them.
        return part.repeat_interleave(samples // max(part.shape[0], 1), 0)

    intervals = KeyIntervals(spread(lo).view(-1), spread(hi).view(-1))

    def unmarked(length: int) -> Tensor:
        return torch.zeros(samples, length, dtype=torch.uint8, device=device)

    # Layouts of what the device has: a graph that is captured takes no copy from the host.
    if hidden is None:
        mask, modalities, marks = AttentionMask(intervals=intervals), 1, unmarked(keys)
    else:
        mask = AttentionMask(intervals=intervals, visible=((True, False), (True, False)))  # modality 1 is hidden
        modalities, marks = 2, spread(hidden).to(torch.uint8)
    k_layout = _marked_on_device(marks, modalities)
    if queries == keys:
        return PaddedPlan(k_layout, None, mask, by_head, None)
    return PaddedPlan(_marked_on_device(unmarked(queries), modalities), k_layout, mask, by_head, None)


def _plan(samples: int, queries: int, keys: int, device, intervals, by_head: bool, plain: str | None) -> PaddedPlan:
    layout = PackedLayout.from_counts(np.full((samples, 1), queries)).to(device)
    k_layout = None if queries == keys else PackedLayout.from_counts(np.full((samples, 1), keys)).to(device)
    return PaddedPlan(layout, k_layout, AttentionMask(intervals=intervals), by_head, plain)


def _marked(modalities: np.ndarray) -> PackedLayout:
    """Samples of equal length with a modality, 0 to 3, for each token: uint8 [samples, L]."""
    samples, length = modalities.shape
    return PackedLayout.from_cu_seqlens(
        torch.arange(samples + 1, dtype=torch.int32, device="cpu") * length,
        total_tokens=modalities.size,
        max_seqlen=length,
        modality_ids=torch.from_numpy(modalities).view(-1),
        num_modalities=4,
    )


def _marked_on_device(marks: Tensor, modalities: int) -> PackedLayout:
    """The same for modalities that must not be read."""
    samples, length = marks.shape
    cu_seqlens = torch.arange(samples + 1, dtype=torch.int32, device=marks.device) * length
    return PackedLayout._from_device_bounds(cu_seqlens, marks.numel(), length, marks.view(-1), modalities)

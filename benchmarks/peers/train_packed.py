"""A training step on our packed batches with somebody else's attention.   T tokens, H heads, D head width."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import packed
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, MaskPlan
from mmmodel.model import Model

Attend = Callable[[Tensor, Tensor, Tensor, PackedLayout, AttentionMask | None], Tensor]


class PackedModel(Model):
    """Model with the attention of its blocks replaced: attend(q, k, v [T, H, D], layout, mask) -> [T, H, D]."""

    def __init__(self, config, tokenizer, *, attend: Attend) -> None:
        super().__init__(config, tokenizer)
        self.attend = attend

    def through_blocks(self, x: Tensor, layout: PackedLayout, mask: AttentionMask | None) -> Tensor:
        for block in self.blocks:
            q, k, v = block.project(x).view(len(x), 3, block.heads, -1).unbind(1)
            x = block.mix(x, self.attend(q, k, v, layout, mask).flatten(1))
        return self.norm(x)


def sdpa_loop(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: AttentionMask | None) -> Tensor:
    """torch SDPA once per stretch of tokens that see one another: what needs no package and no padding."""
    bounds = _bounds(layout, mask, "sdpa loop")
    parts = [
        F.scaled_dot_product_attention(*(t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v)))
        for a, b in itertools.pairwise(bounds.tolist())
        if b > a
    ]
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: AttentionMask | None) -> Tensor:
    """torch.nn.attention.varlen: isolated modalities are samples of their own."""
    from torch.nn.attention.varlen import varlen_attn

    kept = layout.cache.setdefault("varlen peer", {})
    if mask not in kept:
        bounds = _bounds(layout, mask, "varlen")
        kept[mask] = bounds.to(q.device, torch.int32), int(bounds.diff().max())
    bounds, longest = kept[mask]
    return varlen_attn(q, k, v, bounds, bounds, longest, longest)


def flex(flex_attention: Callable, create_block_mask: Callable) -> Attend:
    """FlexAttention; its block mask is built once per layout and mask, in the first block of a step."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: AttentionMask | None) -> Tensor:
        kept = layout.cache.setdefault("flex peer", {})
        if mask not in kept:
            plan, total = MaskPlan.lower(layout, mask), layout.total_tokens
            lo, hi, q_bits, k_bits = plan.kv_lo, plan.kv_hi, plan.q_bits, plan.k_bits

            def seen(batch, head, query, key):
                return (key >= lo[query]) & (key < hi[query]) & ((q_bits[query] & k_bits[key]) != 0)

            kept[mask] = create_block_mask(seen, None, None, total, total, device=q.device)
        heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        return flex_attention(*heads_first, block_mask=kept[mask]).squeeze(0).transpose(0, 1)

    return attend


def missing_varlen(device: torch.device, dtype: str) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA devices only"
    if dtype not in ("bf16", "fp16"):
        return "takes bfloat16, float16"
    return None if packed.installed("torch.nn.attention.varlen") else "not in this torch"


def missing_flex(device: torch.device, dtype: str) -> str | None:
    return None if device.type == "cuda" else "has no backward on CPU"


def _bounds(layout: PackedLayout, mask: AttentionMask | None, who: str) -> Tensor:
    """Host bounds of the stretches of packed tokens that see one another."""
    if mask is None:
        return layout.host.cu_seqlens
    if mask == AttentionMask.isolated(layout.num_modalities):
        return layout.host.segment_cu_seqlens
    raise NotImplementedError(f"{who}: mask is {mask}, this peer knows none and the isolated one")

"""What the varlen faces share: layouts from bounds, once per bounds.   N samples, Tq, Tk tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmkernels.compat import plans
from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask, KeyIntervals
from mmkernels.ops.attention.api import attention

Bounds = Tensor | PackedLayout


def attend_packed(
    name: str, q: Tensor, k: Tensor, v: Tensor, bounds_q: Bounds, bounds_k: Bounds, max_q: int, max_k: int, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """mmkernels.attention of packed q [Tq, H, D], k and v [Tk, G, D] by bounds; options are its own."""
    layout, k_layout = layouts(name, q, k, bounds_q, bounds_k, max_q, max_k)
    return attention(q, k, v, layout=layout, k_layout=k_layout, **options)


def layouts(
    name: str, q: Tensor, k: Tensor, bounds_q: Bounds, bounds_k: Bounds, max_q: int, max_k: int
) -> tuple[PackedLayout, PackedLayout | None]:
    """The layouts of queries and keys (None: the same), kept with their bounds.  max_q, max_k may be None."""
    layout = _layout(name, q, bounds_q, max_q)
    if bounds_k is bounds_q and q.shape[0] == k.shape[0]:
        return layout, None
    return layout, _layout(name, k, bounds_k, max_k)


def _layout(name: str, tokens: Tensor, bounds: Bounds, longest: int | None) -> PackedLayout:
    if isinstance(bounds, PackedLayout):
        return bounds
    if not isinstance(bounds, Tensor):
        raise ValueError(
            f"{name}: bounds are {type(bounds).__name__}, expected an int32 tensor [N + 1] or PackedLayout"
        )
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name}: inside torch.compile bounds cannot be planned; give a PackedLayout in their place, "
            "after mmkernels.prepare_attention on it"
        )
    total = tokens.shape[0]

    def build() -> PackedLayout:
        on_device = bounds.to(tokens.device, torch.int32)
        # Longer than any sample where it is not known: only the tile choice of device-side bounds looks at it.
        most = int(longest) if isinstance(longest, int) else total
        return PackedLayout.from_cu_seqlens(on_device, total_tokens=total, max_seqlen=most)

    return plans.once(bounds, ("packed", total, tokens.device, longest if isinstance(longest, int) else None), build)


def seqused_mask(
    name: str, mask: AttentionMask, bounds_q: Bounds, bounds_k: Bounds, q: Tensor, k: Tensor, seqused: Tensor
) -> AttentionMask:
    """The mask over the first `seqused` [N] keys of each sample, at whose end its last query stands."""
    if mask.causal or mask.align != "bottom_right":
        raise NotImplementedError(f"{name}: seqused_k with a mask of its own place or causality; use window_size")
    layout, keys = layouts(name, q, k, bounds_q, bounds_k, None, None)
    keys = layout if keys is None else keys
    if seqused.shape != (layout.num_samples,):
        raise ValueError(f"{name}: seqused_k has shape {tuple(seqused.shape)}, expected [{layout.num_samples}]")
    seqused = seqused.to(layout.device).long()
    cu = layout.cu_seqlens.long()
    token = torch.arange(layout.total_tokens, device=cu.device)
    sample = torch.searchsorted(cu, token, right=True) - 1
    place = token - cu[sample] + (seqused - cu.diff())[sample]
    left, right = mask.window
    lo = (place - left).clamp(min=0) if left >= 0 else torch.zeros_like(place)
    hi = seqused[sample]
    if right >= 0:
        hi = torch.minimum(hi, (place + right + 1).clamp(min=0))
    return replace(mask, window=(-1, -1), intervals=KeyIntervals(lo, hi))

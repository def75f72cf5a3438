"""What the varlen drop-ins share: layouts from bounds, once per bounds.   N samples, Tq, Tk tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmkernels import tracing, transforms
from mmkernels.compat import kept
from mmkernels.compat.arguments import is_whole
from mmkernels.layout import PackedLayout
from mmkernels.masks import FAR, AttentionMask, KeyIntervals
from mmkernels.ops.attention.api import attention

SampleBounds = Tensor | PackedLayout

NO_BOUNDS = (
    "inside torch.compile bounds cannot be planned; give a PackedLayout in their place, "
    "after mmkernels.prepare_attention on it"
)
NO_SEQUSED = "inside torch.compile seqused_k cannot be planned"


def attend_packed(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: SampleBounds,
    bounds_k: SampleBounds,
    max_q: int,
    max_k: int,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """mmkernels.attention of packed q [Tq, H, D], k and v [Tk, G, D] by bounds; options are its own."""
    layout, k_layout = layouts(name, q, k, bounds_q, bounds_k, max_q, max_k)
    return attention(q, k, v, layout=layout, k_layout=k_layout, **options)


def layouts(
    name: str, q: Tensor, k: Tensor, bounds_q: SampleBounds, bounds_k: SampleBounds, max_q: int, max_k: int
) -> tuple[PackedLayout, PackedLayout | None]:
    """The layouts of queries and keys (None: the same), kept with their bounds.  max_q, max_k may be None."""
    layout = _layout(name, "queries", q, bounds_q, max_q)
    if bounds_k is bounds_q and q.shape[0] == k.shape[0]:
        return layout, None
    return layout, _layout(name, "keys", k, bounds_k, max_k)


def _layout(name: str, whose: str, tokens: Tensor, bounds: SampleBounds, longest: int | None) -> PackedLayout:
    if isinstance(bounds, PackedLayout):
        return bounds
    expected = "expected an int32 tensor [N + 1] or PackedLayout"
    if not isinstance(bounds, Tensor):
        raise ValueError(f"{name}: the bounds of {whose} are {type(bounds).__name__}, {expected}")
    if not is_whole(bounds) or bounds.ndim != 1 or not len(bounds):
        raise ValueError(f"{name}: the bounds of {whose} are {bounds.dtype} {tuple(bounds.shape)}, {expected}")
    return _planned(name, whose, tokens, bounds, longest)


@tracing.host_code(NO_BOUNDS)
def _planned(name: str, whose: str, tokens: Tensor, bounds: Tensor, longest: int | None) -> PackedLayout:
    if torch.compiler.is_compiling():  # torch.export, which does not ask how a function is decorated
        raise NotImplementedError(f"{name}: {NO_BOUNDS}")
    total, bounds = tokens.shape[0], transforms.below(bounds)

    def build() -> PackedLayout:
        if bounds.device.type == "cpu" and not 0 <= int(bounds.min()) <= int(bounds.max()) <= total:  # none may wrap
            raise ValueError(
                f"{name}: the bounds of {whose} are from {int(bounds.min())} to {int(bounds.max())}, expected 0 to "
                f"the {total} tokens"
            )
        # A copy: a layout of device bounds holds them, and one that held the caller's would be kept by itself.
        on_device = bounds.to(tokens.device, torch.int32, copy=True)
        # Longer than any sample where it is not known: only the tile choice of device-side bounds looks at it.
        most = int(longest) if isinstance(longest, int) else total
        try:
            return PackedLayout.from_cu_seqlens(on_device, total_tokens=total, max_seqlen=most)
        except ValueError as error:
            raise ValueError(f"{name}: the bounds of {whose}: {error}") from None

    with torch._C._DisableFuncTorch():  # as in plans.plan
        content = ("packed", total, tokens.device, longest if isinstance(longest, int) else None)
        return kept.once_per_graph(bounds, content, build)


@tracing.host_code(NO_SEQUSED)
def seqused_mask(
    name: str, mask: AttentionMask, layout: PackedLayout, keys: PackedLayout, seqused: Tensor
) -> AttentionMask:
    """The mask over the first `seqused` [N] keys of each sample, at whose end its last query stands.

    Kept with seqused, so that all layers have one mask.
    """
    if mask.causal or mask.align != "bottom_right" or mask.intervals is not None:
        raise NotImplementedError(f"{name}: seqused_k with a mask of its own place, causality or intervals")
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{name}: {NO_SEQUSED}")
    expected = f"expected an int32 tensor [{layout.num_samples}]"
    if not isinstance(seqused, Tensor):
        raise ValueError(f"{name}: seqused_k is {type(seqused).__name__}, {expected}")
    if not is_whole(seqused) or seqused.shape != (layout.num_samples,):
        raise ValueError(f"{name}: seqused_k is {seqused.dtype} {tuple(seqused.shape)}, {expected}")

    def build() -> tuple[AttentionMask, PackedLayout, PackedLayout]:
        if seqused.device.type == "cpu":
            _check_used(name, seqused, keys)
        intervals = _used_intervals(mask.window, layout, seqused.to(layout.device).long())
        return replace(mask, window=(-1, -1), intervals=intervals), layout, keys  # beside it, so their ids stay theirs

    return kept.once_per_graph(seqused, ("seqused", mask, id(layout), id(keys)), build)[0]


def _check_used(name: str, seqused: Tensor, keys: PackedLayout) -> None:
    most = torch.tensor(FAR, device="cpu") if keys.host is None else keys.host.cu_seqlens.diff()
    wrong = (seqused < 0) | (seqused > most)
    if bool(wrong.any()):
        sample = int(wrong.int().argmax())
        most = int(most.expand(len(seqused))[sample])
        raise ValueError(f"{name}: seqused_k of sample {sample} is {int(seqused[sample])}, expected 0 to {most}")


def _used_intervals(window: tuple[int, int], layout: PackedLayout, seqused: Tensor) -> KeyIntervals:
    cu = layout.cu_seqlens.long()
    token = torch.arange(layout.total_tokens, device=cu.device)
    sample = torch.searchsorted(cu, token, right=True) - 1
    place = token - cu[sample] + (seqused - cu.diff())[sample]
    left, right = window
    lo = (place - left).clamp(min=0) if left >= 0 else torch.zeros_like(place)
    hi = seqused[sample]
    if right >= 0:
        hi = torch.minimum(hi, (place + right + 1).clamp(min=0))
    return KeyIntervals(lo, hi)

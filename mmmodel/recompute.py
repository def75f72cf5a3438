"""Less memory for more work: activations that backward computes again.   T tokens, E width."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels.layout import PackedLayout
from mmkernels.masks import AttentionMask
from mmmodel.batches import samples_of


@dataclass(frozen=True)
class Recompute:
    """chunk_tokens: most tokens whose activations are held at one time, 0 for all; blocks: hold only their inputs.

    Chunks are whole samples, so each token gets just what it gets in the whole batch, and the losses see the states of
    all samples.  This is gradient accumulation for losses that do not split, such as contrastive ones: forward without
    a graph, losses on the states of the whole batch, then chunk by chunk forward again and backward, the gradients
    adding up (GradCache, arXiv 2101.06983, by way of torch.utils.checkpoint).
    """

    chunk_tokens: int = 0
    blocks: bool = False


def run(
    blocks: Iterable[nn.Module], x: Tensor, layout: PackedLayout, mask: AttentionMask | None, recompute: Recompute
) -> Tensor:
    """x [T, E] through the blocks.  A sample of more than chunk_tokens is a chunk by itself."""
    if not torch.is_grad_enabled() or recompute == Recompute():
        return _through(blocks, x, layout, mask)
    if recompute.chunk_tokens:
        parts = [
            checkpoint(_through, blocks, x[rows], part, mask, use_reentrant=False)
            for rows, part in _chunks(layout, mask, recompute.chunk_tokens)
        ]
        return torch.cat(parts)
    for block in blocks:
        x = checkpoint(block, x, layout, mask, use_reentrant=False)
    return x


def wrap_front_ends(front_ends: nn.ModuleDict) -> None:
    """Each front end holds its inputs and computes its activations again in backward."""
    for front_end in front_ends.values():
        front_end.forward = functools.partial(checkpoint, front_end.forward, use_reentrant=False)


def _through(blocks, x: Tensor, layout: PackedLayout, mask: AttentionMask | None) -> Tensor:
    for block in blocks:
        x = block(x, layout, mask)
    return x


def _chunks(layout: PackedLayout, mask: AttentionMask | None, most: int) -> list[tuple[slice, PackedLayout]]:
    """Rows of the packed sequence and layout of each chunk; kept on the layout, so that masks are lowered once."""
    if mask is not None and mask.prefix is not None:
        raise NotImplementedError("recompute: chunk_tokens with a mask that has a prefix per sample")
    kept = layout.cache.setdefault("chunks", {})
    if most not in kept:
        kept[most] = list(_cut(layout, most))
    return kept[most]


def _cut(layout: PackedLayout, most: int) -> Iterable[tuple[slice, PackedLayout]]:
    ends = layout.host.cu_seqlens.numpy().astype(np.int64)
    cuts = [0]
    while cuts[-1] < layout.num_samples:  # as many samples as fit, at least one
        fitting = int(np.searchsorted(ends, ends[cuts[-1]] + most, side="right")) - 1
        cuts.append(max(cuts[-1] + 1, fitting))
    samples = samples_of(layout)
    for first, last in itertools.pairwise(cuts):
        part = PackedLayout.from_segments(samples[first:last], num_modalities=layout.num_modalities)
        yield slice(int(ends[first]), int(ends[last])), part.to(layout.device, non_blocking=True)

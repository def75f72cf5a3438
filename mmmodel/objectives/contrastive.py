"""Contrastive alignment of every pair of modalities.   N segments, M modalities, E width, P common width."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import segment_mean
from mmmodel import distributed
from mmmodel.batches import Batch
from mmmodel.configs import PretrainConfig
from mmmodel.features import Item
from mmmodel.objectives.views import Views

START_SCALE, MAX_SCALE = 1 / 0.07, 100.0


class ContrastiveAlignment(nn.Module):
    """Each segment, read in isolation, is drawn to the segments of its concept in the other modalities.

    loss = mean over pairs of modalities (a, b) and both directions of
           -mean over positives j of log softmax_k(s p_i . p_k)[j],   p = normalised W_m mean(segment), s learned
    CLIP's loss (arXiv 2103.00020) for every pair, with several positives as in SupCon (arXiv 2004.11362).
    """

    needs = "a concept in two modalities"
    compares = True

    def __init__(self, config: PretrainConfig, model) -> None:
        super().__init__()
        self.config, shape = config.objectives.contrastive, config.model
        self.modalities = shape.modalities
        self.heads = nn.Parameter(
            torch.randn(len(shape.modalities), shape.width, shape.embed_width) * shape.width**-0.5
        )
        self.log_scale = nn.Parameter(torch.tensor([math.log(START_SCALE)]))  # [1]: what has no shape cannot be split

    def finds(self, items: Sequence[Item]) -> bool:
        modalities, groups = defaultdict(set), defaultdict(set)  # by concept
        for item in items:
            if len(item.rows) > 1:
                return True
            if item.rows:
                modalities[item.concept].update(item.rows)
                groups[item.concept].add(item.group)
        # of a group a batch holds one sample
        return any(len(modalities[concept]) > 1 and len(groups[concept]) > 1 for concept in groups)

    def forward(self, views: Views, inputs: None) -> tuple[Tensor, dict[str, Tensor]]:
        batch = views.batch
        views.points = self.points(views.isolated, batch.layout, batch.modality)
        views.scale = self.scale()
        everyone = gathered(views.points, batch)  # negatives of all ranks
        with torch.autocast(views.points.device.type, enabled=False):  # a score of 100 has three digits in bf16
            return self.loss(everyone[0].float(), *everyone[1:])

    def scale(self) -> Tensor:
        return self.log_scale[0].exp().clamp(max=MAX_SCALE)

    def points(self, packed: Tensor, layout: PackedLayout, modality: Tensor) -> Tensor:
        """One point of unit length per segment, [N, P].  packed [T, E], modality int64 [N]."""
        means = segment_mean(packed, layout)
        points = torch.einsum("ne,mep->nmp", means, self.heads)
        modality = modality.to(points.device, non_blocking=True)
        return F.normalize(points[torch.arange(len(points), device=points.device), modality], dim=-1)

    def loss(self, points: Tensor, modality: Tensor, concept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """points [N, P] of unit length; modality, concept int64 [N].  The mean over the pairs of modalities present.

        modality and concept are read on the host: to ask a GPU which rows have a positive is to wait for it, each time.
        """
        scale = self.scale()
        modality, concept = modality.cpu().numpy(), concept.cpu().numpy()
        rows = [np.flatnonzero(modality == m) for m in range(len(self.modalities))]
        own = [points.index_select(0, _on(points, each)) for each in rows]
        named = [_on(points, concept[each]) for each in rows]
        losses, metrics = [], {"scale": scale.detach()}
        for a, b in combinations(range(len(self.modalities)), 2):
            one, other = concept[rows[a]], concept[rows[b]]
            met = np.isin(one, other), np.isin(other, one)
            if not met[0].any():
                continue
            positive = _places(met[0], points), _places(met[1], points)
            same = named[a].unsqueeze(1) == named[b].unsqueeze(0)
            logits = own[a] @ own[b].t() * scale
            losses.append(both_ways(logits, same, positive))
            name = f"{self.modalities[a]}-{self.modalities[b]}"
            metrics |= {f"loss/{name}": losses[-1].detach(), f"top1/{name}": top1(logits, same, positive[0])}
        if not losses:
            return points.sum() * 0, metrics  # no concept has two modalities: nothing to learn from this batch
        return torch.stack(losses).mean(), metrics


def gathered(points: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Points, modality and concept of the segments of all ranks."""
    if distributed.size() == 1:  # numbers that the host has stay there
        return points, batch.modality, batch.concept
    return distributed.gathered(points, batch.modality.to(points.device), batch.concept.to(points.device))


def both_ways(logits: Tensor, same: Tensor, positive: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """positive: of the rows and of the columns, which have one; None: all."""
    return (multi_positive(logits, same, positive[0]) + multi_positive(logits.t(), same.t(), positive[1])) / 2


def top1(logits: Tensor, same: Tensor, positive: Tensor | None) -> Tensor:
    """Of the rows that have a positive, the share whose largest logit is one."""
    return _chosen(same.gather(1, logits.argmax(1, keepdim=True)), positive).float().mean()


def multi_positive(logits: Tensor, same: Tensor, positive: Tensor | None) -> Tensor:
    """Cross entropy against the uniform distribution over each row's positives; rows without one do not count.

    logits, same [Q, K]; positive int64, the rows that have one, None for all.
    """
    weight = _chosen(same, positive).to(logits.dtype)
    return -(F.log_softmax(_chosen(logits, positive), dim=1) * weight).sum(dim=1).div(weight.sum(dim=1)).mean()


def _chosen(rows: Tensor, places: Tensor | None) -> Tensor:
    return rows if places is None else rows.index_select(0, places)


def _places(wanted: np.ndarray, like: Tensor) -> Tensor | None:
    """Where wanted is true, on like's device; None where it is everywhere."""
    return None if wanted.all() else _on(like, np.flatnonzero(wanted))


def _on(like: Tensor, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers).to(like.device, non_blocking=True)

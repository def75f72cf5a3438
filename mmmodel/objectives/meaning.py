"""Alignment with what a frozen language model makes of the caption of a concept.

N segments, M modalities, E width, P common width, C concepts, Z width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.features import Item
from mmmodel.objectives.contrastive import both_ways, gathered, top1
from mmmodel.objectives.views import Views


class UntaughtError(ConfigError):
    """The data have nothing that `meaning` learns from: no captions in its language."""


class Meaning(nn.Module):
    """The points of all modalities are drawn to points that a language model gives for their concepts.

    loss = mean over the modalities m and both directions of
           -mean over positives of log softmax_c(s p_i . t_c),   t_c = normalised A z_c
    over the segments i of m and the concepts c in the batch; p_i and s are the contrastive objective's, z_c what
    `teach` was given, A is learned.  It is alignment with a modality that is only there in pretraining: captions of a
    few hundred concepts do not say that a wolf is like a dog, and z does (text towers that stay locked: LiT, arXiv
    2111.07991).  Concepts without a z do not count.
    """

    needs = "captions of the training samples"
    compares = True

    def __init__(self, config: PretrainConfig, model) -> None:
        super().__init__()
        self.config, shape = config.objectives.meaning, config.model
        if not config.objectives.contrastive.weight:
            raise ConfigError("objectives: meaning draws the points of contrastive, whose weight is 0")
        self.modalities = shape.modalities
        self.map = nn.Parameter(torch.randn(self.config.width, shape.embed_width) * self.config.width**-0.5)
        # Not part of a run's weights: the next process asks the language model again.
        self.register_buffer("concepts", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("vectors", torch.zeros(0, self.config.width), persistent=False)

    def finds(self, items: Sequence[Item]) -> bool:
        return True  # without captions in its language there is nothing to teach it, which is an error of its own

    def teach(self, concepts: Tensor, vectors: Tensor) -> None:
        """concepts int64 [C], different numbers; vectors [C, Z] of what they mean.

        Kept as directions from their common mean, of unit length.  Raises ConfigError for another Z.
        """
        if vectors.shape[1:] != self.vectors.shape[1:]:
            raise ConfigError(
                f"objectives: meaning.width is {self.config.width}, expected the language model's {vectors.shape[1]}"
            )
        order = concepts.argsort()
        self.concepts, self.vectors = concepts[order], F.normalize(vectors - vectors.mean(0), dim=-1)[order]

    def forward(self, views: Views, inputs: None) -> tuple[Tensor, dict[str, Tensor]]:
        if not len(self.concepts):
            raise RuntimeError("meaning: teach() comes before the first step")
        batch = views.batch
        points, modality, concept = gathered(views.points, batch)
        with torch.autocast(points.device.type, enabled=False):
            return self.loss(points.float(), modality, concept, views.scale)

    def loss(
        self, points: Tensor, modality: Tensor, concept: Tensor, scale: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """points [N, P] of unit length; modality, concept int64 [N].  The mean over the modalities present."""
        modality, concept = modality.to(points.device), concept.to(points.device)
        present = concept.unique()
        place = torch.searchsorted(self.concepts, present).clamp(max=len(self.concepts) - 1)
        known = self.concepts[place] == present
        present, targets = present[known], F.normalize(self.vectors[place[known]] @ self.map, dim=-1)
        losses, metrics = [], {}
        for m, name in enumerate(self.modalities):
            own = (modality == m).nonzero().squeeze(1)
            same = concept[own].unsqueeze(1) == present.unsqueeze(0)
            if not same.any():
                continue
            logits = points[own] @ targets.t() * scale
            positive = tuple(same.any(dim).nonzero().squeeze(1) for dim in (1, 0))
            losses.append(both_ways(logits, same, positive))
            metrics |= {f"loss/{name}": losses[-1].detach(), f"top1/{name}": top1(logits, same, positive[0])}
        if not losses:
            return 0 * (points.sum() + self.map.sum()), metrics  # no concept that the language model was asked about
        return torch.stack(losses).mean(), metrics

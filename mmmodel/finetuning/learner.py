"""A pretrained encoder with a new output layer.   B samples, N segments, T tokens, E width, C outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import segment_mean
from mmmodel.batches import Batch
from mmmodel.finetuning.labels import UNSEEN, Labels
from mmmodel.model import Model
from mmmodel.update import decays


class FineTuned(nn.Module):
    """One linear layer on the mean of a sample's segment means: C classes, labels or numbers."""

    def __init__(self, model: Model, outputs: int, *, visibility: str, dropout: float) -> None:
        super().__init__()
        self.model = model
        self.visibility = visibility
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(model.config.width, outputs)
        nn.init.zeros_(self.head.weight)  # all classes equally likely at first: the encoder's first gradients are small
        nn.init.zeros_(self.head.bias)

    def pooled(self, batch: Batch) -> Tensor:
        """[B, E]"""
        mask = self.model.isolated() if self.visibility == "isolated" else None
        return sample_mean(self.model(batch, mask), batch.layout)

    def forward(self, batch: Batch) -> Tensor:
        """[B, C]"""
        return self.outputs(self.pooled(batch))

    def outputs(self, pooled: Tensor) -> Tensor:
        """pooled [B, E] -> [B, C]"""
        return self.head(self.dropout(pooled))


class Aligned(nn.Module):
    """The retrieval head: the points of pretraining's contrastive objective, with labels in place of concepts."""

    def __init__(self, model: Model, contrastive: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, contrastive

    def points(self, batch: Batch) -> Tensor:
        """One point of unit length per segment, [N, P]."""
        packed = self.model(batch, self.model.isolated())
        return self.head.points(packed, batch.layout, batch.modality)

    def forward(self, batch: Batch) -> Tensor:
        """The loss: batch.concept holds the labels."""
        return self.head.loss(self.points(batch), batch.modality, batch.concept)[0]


def sample_mean(packed: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over the segments of each sample of the mean of their tokens: [B, E] from packed [T, E].

    Of segment means, or the modality with the most tokens would drown the others.
    """
    means = segment_mean(packed, layout)
    sample = torch.from_numpy(layout.segments[:, 0].astype("int64"))
    counts = torch.bincount(sample, minlength=len(layout.cu_seqlens) - 1).clamp_min(1)
    sample = sample.to(means.device, non_blocking=True)
    sums = means.new_zeros(len(counts), means.shape[1]).index_add(0, sample, means)
    return sums / counts.to(means.device, means.dtype, non_blocking=True).unsqueeze(1)


def make_loss(
    labels: Labels, values: list, *, balance: bool, device: torch.device | str = "cpu"
) -> Callable[[Tensor, Tensor], Tensor]:
    """loss(outputs [B, C], targets as `Labels.encode`).  device: where both will be.

    classification, qa: cross entropy, with balance weighted by 1 / count of the class among the training labels
    `values`.  multilabel: binary cross entropy.  regression: mean squared error.
    """
    if labels.task == "multilabel":
        return F.binary_cross_entropy_with_logits
    if labels.task == "regression":
        return F.mse_loss
    weight = None
    if balance:
        counts = torch.bincount(labels.encode(values), minlength=labels.outputs)
        weight = (len(values) / (labels.outputs * counts.clamp_min(1).float())).to(device)
    return partial(F.cross_entropy, weight=weight, ignore_index=UNSEEN)


def parameter_groups(learner: nn.Module, *, lr: float, layer_decay: float, weight_decay: float) -> list[dict]:
    """AdamW groups: rate lr * layer_decay ** (layers above), the output layer at lr, and the front ends and the
    embedding below the first block.  Weight decay on what decays in pretraining."""
    layers = learner.model.config.layers
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_depth(name, layers), decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * layer_decay ** (layers + 1 - depth),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (depth, decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def _depth(name: str, layers: int) -> int:
    """0: what feeds the first block; i + 1: block i; layers + 1: the output layer."""
    parts = name.split(".")
    if parts[0] != "model":
        return layers + 1
    if parts[1] == "blocks":
        return int(parts[2]) + 1
    return layers if parts[1] == "norm" else 0

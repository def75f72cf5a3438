"""Masked image and audio modelling: cells of the input are hidden and their content is predicted.

K hidden cells, C numbers in a cell, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmkernels.ops.packing.api import gather_rows
from mmmodel.configs import ConfigError, MaskedConfig, PretrainConfig
from mmmodel.features import Item
from mmmodel.objectives.hiding import draw_hidden
from mmmodel.objectives.views import Hidden, Views


class MaskedFeatures(nn.Module):
    """loss = mean over hidden cells and their numbers of |A h + a - cell|, read from the whole sample.

    Pixels: SimMIM (arXiv 2111.09886), whose loss it is, on means of 4 x 4 pixels.  Log-mel frames, in runs: Mockingjay
    (arXiv 1910.12638).  A cell is hidden twice: in the features, before any convolution reaches it from a neighbour,
    and in the stream, where a learned row stands in its place.
    """

    def __init__(self, config: PretrainConfig, model, name: str) -> None:
        super().__init__()
        self.config: MaskedConfig = getattr(config.objectives, f"masked_{name}")
        self.hides = self.needs = name
        if not hasattr(model.front_ends[name], "cells"):
            raise ConfigError(f"objectives: masked_{name} needs a front end that can hide cells; this encoder has none")
        width = config.model.width
        self.cover = nn.Parameter(torch.randn(width) * width**-0.5)
        self.head = nn.Linear(width, model.front_ends[name].cell_width)

    def finds(self, items: Sequence[Item]) -> bool:
        return any(self.hides in item.rows for item in items)

    def hide(self, features: Sequence[np.ndarray], front_end, rng: np.random.Generator) -> Hidden:
        masked, rows, targets, start = [], [], [], 0
        for feature in features:
            cells = front_end.cells(feature)  # [n, C]
            # A segment of one cell keeps it: with nothing around it there is nothing to learn.
            places = draw_hidden(len(cells), self.config.probability, self.config.span, rng)
            places = places if len(cells) > 1 else places[:0]
            masked.append(front_end.hide(feature, places))
            rows.append(start + places)
            targets.append(cells[places])
            start += int(np.prod(front_end.shape(feature)))
        empty = np.zeros((0, front_end.cell_width), np.float32)
        return Hidden(masked, np.concatenate([*rows, np.zeros(0, np.int64)]), np.concatenate([*targets, empty]))

    def forward(self, views: Views, inputs: None) -> tuple[Tensor, dict[str, Tensor]]:
        masked = views.masked_batch
        targets = masked.targets[self.hides]
        if not len(targets):
            return 0 * self.cover.sum(), {}
        return self.loss(gather_rows(views.masked, masked.packed_rows[self.hides]), targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [K, E], targets [K, C] -> mean absolute error; "of_mean" is it over that of the best constant."""
        loss = (self.head(hidden) - targets).abs().mean()
        constant = (targets - targets.median(dim=0).values).abs().mean()
        return loss, {"of_mean": loss.detach() / constant.clamp_min(1e-6)}

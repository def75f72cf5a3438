"""The views of a batch that objectives share: each is computed once per step, when an objective first asks for it.

T tokens, N segments, M modalities, E width, K hidden tokens, P common width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels.layout import PackedLayout
from mmmodel.batches import Batch, sent
from mmmodel.model import View


@dataclass(frozen=True)
class Hidden:
    """What a masking objective did to the segments of its modality; on the host."""

    features: list[np.ndarray]  # of each segment, with parts hidden
    rows: np.ndarray  # int64 [K], rows of the modality's stream that are hidden
    targets: np.ndarray  # [K, ...], what stood there


@dataclass(frozen=True)
class MaskedBatch:
    """The first samples of a batch with parts hidden, to be read jointly."""

    layout: PackedLayout
    lengths: tuple[int, ...]  # rows of each stream that these samples take
    inputs: dict[str, tuple[Tensor, ...]]  # of the front ends whose features have parts hidden
    stream_rows: dict[str, Tensor]  # per modality int64 [K], hidden rows of its stream
    packed_rows: dict[str, Tensor]  # per modality int64 [K], where they stand in the packed sequence
    targets: dict[str, Tensor]  # per modality [K, ...]

    def to(self, device: torch.device) -> MaskedBatch:
        if device.type == "cpu":
            return self

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: sent(tensor, device) for name, tensor in tensors.items()}

        inputs = {name: tuple(sent(t, device) for t in ts) for name, ts in self.inputs.items()}
        layout = self.layout.to(device, non_blocking=True)
        rows = moved(self.stream_rows), moved(self.packed_rows)
        return MaskedBatch(layout, self.lengths, inputs, *rows, moved(self.targets))


def mask_batch(batch: Batch, front_ends, objectives: Mapping[str, Any], share: float, rng) -> MaskedBatch:
    """Hide parts of the first `share` of the samples: each objective in the segments of its modality.

    objectives: per modality the objective that hides.  Features are hidden before the front end reads them, so that no
    receptive field reaches what is hidden.
    """
    samples = batch.segments[: max(1, round(share * len(batch.segments)))]
    layout = PackedLayout.from_segments(
        samples, num_modalities=batch.layout.num_modalities, special_tokens=batch.special_tokens
    )
    inputs, stream_rows, packed_rows, targets = {}, {}, {}, {}
    for m, (name, front_end) in enumerate(front_ends.items()):
        if name not in objectives:
            continue
        count = sum(modality == m for parts in samples for modality, _ in parts)
        hidden = objectives[name].hide(batch.features[name][:count], front_end, rng)
        inputs[name] = front_end.collate(hidden.features)
        stream_rows[name] = torch.from_numpy(hidden.rows)
        targets[name] = torch.from_numpy(hidden.targets)
        # the rows of a stream stand in the packed sequence in the same order
        own = np.flatnonzero((layout.modality_ids.numpy() == m) & (layout.source_rows.numpy() >= 0))
        packed_rows[name] = torch.from_numpy(own[hidden.rows])
    return MaskedBatch(layout, layout.stream_lengths, inputs, stream_rows, packed_rows, targets)


class Views:
    """One step's batch as the objectives see it."""

    def __init__(self, model, batch: Batch, masked: MaskedBatch | None, covers: Mapping[str, Tensor]) -> None:
        """covers: per modality the learned row [E] that stands where rows of its stream are hidden, if it has one."""
        self.model, self.batch, self.covers = model, batch, covers
        self.masked_batch = masked
        self.points: Tensor | None = None  # [N, P], left here by the contrastive objective for who wants hard negatives
        self.scale: Tensor | None = None  # its factor on their products

    @cached_property
    def streams(self) -> list[Tensor]:
        return self.model.streams(self.batch)

    @property
    def isolated(self) -> Tensor:
        """Packed [T, E], every segment read alone: the unimodal encoders in one pass."""
        return self._together[0]

    @cached_property
    def masked(self) -> Tensor:
        """Packed states of the masked batch, each sample read whole: one pass for all masking objectives.

        The same pass as the isolated view's, where that was asked for before.
        """
        if "_together" in self.__dict__:
            return self._together[1]
        return self.model.encode(*self._masked_view())

    @cached_property
    def _together(self) -> list[Tensor]:
        """The isolated view and, if parts are hidden in this step, the masked one: what hides them will ask for it."""
        views = [(self.streams, self.batch.layout, self.model.isolated())]
        return self.model.encode_views(views if self.masked_batch is None else [*views, self._masked_view()])

    def _masked_view(self) -> View:
        masked = self.masked_batch
        streams = []
        for (name, front_end), stream, length in zip(
            self.model.front_ends.items(), self.streams, masked.lengths, strict=True
        ):
            if name not in masked.inputs:
                streams.append(stream[:length])  # the samples are the batch's first: nothing is copied
                continue
            stream = front_end(*masked.inputs[name])
            if name in self.covers:
                rows = masked.stream_rows[name]
                stream = stream.index_copy(0, rows, self.covers[name].to(stream.dtype).expand(len(rows), -1))
            streams.append(stream)
        return streams, masked.layout, None

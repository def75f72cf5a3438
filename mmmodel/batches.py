"""From samples to packed batches; each is a pure function of (seed, step), so a resumed run sees the very next one.

B samples, M modalities, N segments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from mmkernels.layout import PackedLayout
from mmmodel.configs import ConfigError
from mmmodel.features import Features, Item

Segments = list[list[tuple[int, int | tuple[int, int]]]]


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, tuple[Tensor, ...]] = field(repr=False)  # per modality, what its front end takes
    segments: Segments = field(repr=False)  # per sample (modality, shape without the special token)
    special_tokens: tuple[int | None, ...]
    layout: PackedLayout
    # On the host, wherever the rest is:
    modality: Tensor = field(repr=False)  # int64 [N]
    concept: Tensor = field(repr=False)  # int64 [N]; equal numbers mean the same concept, in every batch and process
    features: dict[str, list[np.ndarray]] = field(repr=False)  # what `inputs` was collated from, in the stream's order

    def to(self, device: torch.device | str) -> Batch:
        device = torch.device(device)
        if device.type == "cpu":
            return self
        inputs = {name: tuple(sent(t, device) for t in ts) for name, ts in self.inputs.items()}
        layout = self.layout.to(device, non_blocking=True)
        return replace(self, inputs=inputs, layout=layout)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, by a copy for which the host does not wait.

    Of what is large and not pinned CUDA copies behind all that the GPU was asked for, and lets the host wait.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Sampler:
    """Which items make up the batch of a step: distinct things, in one language.

    A batch holds each image once (in whichever language), so that its negatives are negatives; and one language where
    the data has several, so that telling languages apart solves nothing.
    """

    def __init__(self, items: Sequence[Item], *, batch_size: int, seed: int) -> None:
        groups: dict[str, dict[str, list[int]]] = {}
        for i, item in enumerate(items):
            groups.setdefault(item.group, {}).setdefault(item.language, []).append(i)
        if len(groups) < batch_size:
            raise ConfigError(
                f"batch_size is {batch_size}, expected at most the {len(groups)} distinct items of the training data"
            )
        self.items = items
        self.groups = [groups[name] for name in sorted(groups)]
        self.languages = sorted({item.language for item in items})
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> list[int]:
        """Item numbers of the step's batch."""
        rng = np.random.default_rng([self.seed, step, 0])
        language = self.languages[rng.integers(len(self.languages))]
        chosen = []
        for group in self._groups(step):
            candidates = group.get(language) or [i for items in group.values() for i in items]
            chosen.append(candidates[rng.integers(len(candidates))])
        return chosen

    def joined(self, batches: int = 32) -> float:
        """Mean over the first batches of how many concepts a batch shows in two modalities or more."""
        found = 0
        for step in range(batches):
            seen: dict[str, set[str]] = {}
            for item in (self.items[i] for i in self.batch(step)):
                seen.setdefault(item.concept, set()).update(item.rows)
            found += sum(len(modalities) > 1 for modalities in seen.values())
        return found / batches

    def _groups(self, step: int) -> list[dict[str, list[int]]]:
        """The next batch_size groups of an endless row of shuffled epochs; a batch never spans two epochs."""
        per_epoch = len(self.groups) // self.batch_size
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.groups))
        return [self.groups[i] for i in order[place * self.batch_size : (place + 1) * self.batch_size]]


def samples_of(layout: PackedLayout) -> list[list[tuple[int, int]]]:
    """(modality, length) of each segment of each sample; special tokens count in the lengths."""
    samples: list[list[tuple[int, int]]] = [[] for _ in range(layout.num_samples)]
    for sample, modality, length, _ in layout.segments.tolist():
        samples[sample].append((modality, length))
    return samples


def concept_number(concept: str) -> int:
    """63 bits that ranks agree on without talking: two of a million concepts collide with a chance of 5e-8."""
    return int.from_bytes(hashlib.blake2b(concept.encode(), digest_size=8).digest()) >> 1


def collate(
    items: Sequence[Item],
    features: Features,
    front_ends: nn.ModuleDict,
    special: tuple[int | None, ...],
    rng: np.random.Generator | None = None,
) -> Batch:
    """Pack items; with `rng` their features are augmented first.  Modalities that an item lacks take no space."""
    streams: dict[str, list[np.ndarray]] = {name: [] for name in front_ends}
    segments: Segments = []
    modality, concept = [], []
    for item in items:
        parts = []
        for m, (name, front_end) in enumerate(front_ends.items()):
            if name not in item.rows:
                continue
            value = features.get(name, item.rows[name])
            if rng is not None:
                value = front_end.augment(value, rng)
            streams[name].append(value)
            parts.append((m, front_end.shape(value)))
            modality.append(m)
            concept.append(concept_number(item.concept))
        segments.append(parts)
    return Batch(
        inputs={name: front_end.collate(streams[name]) for name, front_end in front_ends.items()},
        segments=segments,
        special_tokens=special,
        layout=PackedLayout.from_segments(segments, num_modalities=len(front_ends), special_tokens=special),
        modality=torch.tensor(modality, dtype=torch.int64),
        concept=torch.tensor(concept, dtype=torch.int64),
        features=streams,
    )

"""Image-text and audio-text matching: do two segments belong together?   N segments, Q pairs, E width.

A negative may be hard: drawn among the segments that the contrastive scores take for a match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.layout import PackedLayout
from mmkernels.ops.packing.api import gather_rows, segment_mean
from mmmodel.batches import Batch
from mmmodel.configs import ConfigError, MatchingConfig, PretrainConfig
from mmmodel.features import Item
from mmmodel.objectives.views import Views


@dataclass(frozen=True)
class Anchors:
    """The true pairs of one kind, and noise for drawing their negatives; on the host."""

    first: np.ndarray  # int64 [A], segments of the first modality
    second: np.ndarray  # int64 [A], of the same samples
    all_first: np.ndarray  # int64 [F], every segment of the first modality in the batch
    all_second: np.ndarray  # int64 [S]
    noise_first: np.ndarray  # Gumbel [A, F]
    noise_second: np.ndarray  # Gumbel [A, S]
    concept: np.ndarray  # int64 [N]


class Matching(nn.Module):
    """loss = mean over pairs of binary cross entropy of w . gelu(A [a; b; a b] + c) + d, a and b the means of the two
    segments read jointly.

    Per true pair (a, b) two negatives, as in ALBEF (arXiv 2107.07651): (a, b') with b' drawn by
    softmax(hardness scores[a]) among the segments of other concepts, and (a', b) alike.  Without contrastive scores, or
    at hardness 0, any is equally likely.
    """

    compares = True

    def __init__(self, config: PretrainConfig, model) -> None:
        super().__init__()
        self.config = config.objectives.matching
        names = config.model.modalities
        self.named = named_pairs(config)
        self.needs = "samples with " + " or ".join(" and ".join(pair) for pair in self.named)
        self.pairs = [(names.index(a), names.index(b)) for a, b in self.named]
        width = config.model.width
        self.dense = nn.Linear(3 * width, width)
        self.out = nn.Linear(width, 1)

    def finds(self, items: Sequence[Item]) -> bool:
        return any(item.rows.keys() >= set(pair) for pair in self.named for item in items)

    def prepare(self, batch: Batch, rng: np.random.Generator) -> list[Anchors]:
        limit = max(1, round(self.config.share * len(batch.segments)))
        sample, modality = batch.layout.segments[:, 0], batch.layout.segments[:, 1]
        concept = batch.concept.numpy()
        prepared = []
        for a, b in self.pairs:
            all_first, all_second = np.flatnonzero(modality == a), np.flatnonzero(modality == b)
            both = np.intersect1d(sample[all_first], sample[all_second])[:limit]
            first = np.array([all_first[sample[all_first] == s][0] for s in both], np.int64)
            second = np.array([all_second[sample[all_second] == s][0] for s in both], np.int64)
            noise = [rng.gumbel(size=(len(both), len(every))) for every in (all_first, all_second)]
            prepared.append(Anchors(first, second, all_first, all_second, *noise, concept))
        return prepared

    def forward(self, views: Views, inputs: Sequence[Anchors]) -> tuple[Tensor, dict[str, Tensor]]:
        scores = _scores(views) if self.config.hardness else None
        pairs = np.concatenate([draw_pairs(anchors, scores, self.config.hardness) for anchors in inputs])  # [Q, 3]
        if not len(pairs):  # no sample has both modalities
            return 0 * self.out.bias.sum(), {}
        streams, layout = pair_streams(views.streams, views.batch, pairs[:, :2])
        means = segment_mean(views.model.encode(streams, layout), layout)
        labels = torch.from_numpy(pairs[:, 2]).to(means.device, means.dtype, non_blocking=True)
        return self.loss(means[0::2], means[1::2], labels)

    def logits(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b [Q, E], means of the two segments of each pair -> [Q]; positive: they match."""
        hidden = F.gelu(self.dense(torch.cat([a, b, a * b], dim=1)), approximate="tanh")
        return self.out(hidden).squeeze(1)

    def loss(self, a: Tensor, b: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """labels [Q], 1: a match.  "accuracy" weighs matches and negatives alike: 0.5 is chance.

        For it a pair matches that is likelier to than the share of matches among the pairs, a third as a rule.
        """
        logits = self.logits(a, b)
        yes, no = labels.sum().clamp_min(1), (1 - labels).sum().clamp_min(1)
        right = ((logits > (yes / no).log()) == (labels > 0.5)).float()
        accuracy = ((right * labels).sum() / yes + (right * (1 - labels)).sum() / no) / 2
        return F.binary_cross_entropy_with_logits(logits, labels), {"accuracy": accuracy}


def named_pairs(config: PretrainConfig) -> list[tuple[str, str]]:
    """The pairs of modalities that are matched: of the default ones those that the model reads.

    Raises ConfigError if none is left, or for a pair of the user's own that is not two modalities of the model.
    """
    pairs, names = config.objectives.matching.pairs, config.model.modalities
    split = [tuple(pair.split("-")) for pair in pairs]
    fits = [len(parts) == 2 and parts[0] != parts[1] and set(parts) <= set(names) for parts in split]
    wrong = [pair for pair, fit in zip(pairs, fits, strict=True) if not fit]
    if not any(fits) or (wrong and pairs != MatchingConfig().pairs):
        raise ConfigError(
            f"objectives.matching.pairs is {','.join(pairs)!r}, expected pairs of {', '.join(names)} joined by -; "
            "objectives.matching.weight=0 leaves matching out"
        )
    return [parts for parts, fit in zip(split, fits, strict=True) if fit]


def draw_pairs(anchors: Anchors, scores: np.ndarray | None, hardness: float = 1.0) -> np.ndarray:
    """int64 [Q, 3]: segment of the first modality, segment of the second, 1 for a true pair.

    scores: [N, N] between segments, or None.  Adding Gumbel noise and taking the largest draws by
    softmax(hardness scores).
    An anchor whose concept is the only one in the batch gets no negative.
    """
    first, second, concept = anchors.first, anchors.second, anchors.concept
    rows = [np.stack([first, second, np.ones_like(first)], axis=1)]
    for own, every, noise, by_second in (
        (first, anchors.all_second, anchors.noise_second, True),
        (second, anchors.all_first, anchors.noise_first, False),
    ):
        if not len(own) or not len(every):
            continue
        drawn = noise if scores is None else noise + hardness * scores[np.ix_(own, every)]
        drawn = np.where(concept[own][:, None] == concept[every][None, :], -np.inf, drawn)
        possible = np.isfinite(drawn).any(axis=1)
        other = every[drawn.argmax(axis=1)]
        pair = [own, other] if by_second else [other, own]
        rows.append(np.stack([*pair, np.zeros_like(own)], axis=1)[possible])
    return np.concatenate(rows)


def pair_streams(streams: Sequence[Tensor], batch: Batch, pairs: np.ndarray) -> tuple[list[Tensor], PackedLayout]:
    """Streams and layout in which each pair of segments, int [Q, 2], is a sample of its own; segments may repeat."""
    segments = batch.layout.segments
    shapes = [shape for parts in batch.segments for _, shape in parts]
    rows: list[list[np.ndarray]] = [[] for _ in streams]
    samples = []
    for pair in pairs.tolist():
        samples.append([(int(segments[s, 1]), shapes[s]) for s in pair])
        for s in pair:
            _, modality, _, start = segments[s].tolist()
            rows[modality].append(np.arange(start, start + int(np.prod(shapes[s]))))
    layout = PackedLayout.from_segments(samples, num_modalities=len(streams), special_tokens=batch.special_tokens)
    gathered = []
    for stream, parts in zip(streams, rows, strict=True):
        index = torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.int64)])).to(stream.device, non_blocking=True)
        gathered.append(gather_rows(stream, index) if stream.ndim == 2 else stream.index_select(0, index))
    return gathered, layout.to(streams[0].device, non_blocking=True)


def _scores(views: Views) -> np.ndarray | None:
    """Scaled products of all points; beside its figures the one value that a step reads back from the device."""
    if views.points is None:
        return None
    points = views.points.detach().float()
    return (points @ points.t() * views.scale.detach()).float().cpu().numpy()  # bf16 under autocast

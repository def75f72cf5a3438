"""What is lost without a modality: the loss on hidden words, and the rank of what belongs together.

K hidden pieces, P common width, n items to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch.nn import functional as F

from mmkernels.ops.packing.api import gather_rows
from mmmodel.embed import make_batch
from mmmodel.explaining.sample import Sample, hide_each_word, pieces_of
from mmmodel.frontends.text import special_ids
from mmmodel.pretraining import Pretraining

BATCH = 32


@dataclass(frozen=True)
class WordLoss:
    """Reading hidden words with these modalities beside the text."""

    given: tuple[str, ...]
    nats: tuple[float, ...]  # per piece of the text, hidden alone

    @property
    def mean(self) -> float:
        return float(np.mean(self.nats))

    @property
    def error(self) -> float:
        """Standard error of the mean over pieces."""
        return float(np.std(self.nats, ddof=1) / len(self.nats) ** 0.5) if len(self.nats) > 1 else 0.0


@dataclass(frozen=True)
class Search:
    """Looking for the sample's `target` by the sum of the points of the `given` modalities."""

    target: str
    given: tuple[str, ...]
    similarity: float  # cosine with its own
    rank: int  # 1: nothing of another concept stands before it
    choices: int


@torch.no_grad()
def word_loss(learner: Pretraining, sample: Sample, drop: tuple[str, ...] = ()) -> WordLoss | None:
    """-log probability of each word piece, hidden alone, read jointly with what is left of the sample.

    None where the model has no masked language modelling or the sample no words.
    """
    sample = sample.without(*drop)
    if "masked_text" not in learner.objectives or "text" not in sample.modalities:
        return None
    model, head = learner.model, learner.objectives["masked_text"]
    ids = torch.from_numpy(sample.feature("text").astype(np.int64)).to(model.token_table.device)
    positions = pieces_of(sample.feature("text"), special_ids(model.tokenizer))
    if not len(positions):
        return None
    text = list(model.front_ends).index("text")
    items, features = hide_each_word(sample, positions, head.mask_id)
    nats: list[float] = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        batch = make_batch(model, part, features)
        hidden = model(batch)
        rows = (batch.layout.modality_ids == text).nonzero().squeeze(1).view(len(part), -1)  # captions are as long
        place = torch.from_numpy(positions[start : start + len(part)]).to(ids.device)
        hidden = gather_rows(hidden, rows.gather(1, place.unsqueeze(1)).squeeze(1))
        for row, target in zip(hidden, ids[place], strict=True):
            loss, _ = head.loss(row.unsqueeze(0), target.unsqueeze(0), model.token_table)
            nats.append(float(loss))
    return WordLoss(tuple(name for name in sample.modalities if name != "text"), tuple(nats))


def word_losses(learner: Pretraining, sample: Sample) -> list[WordLoss]:
    """With every subset of the other modalities, the whole sample first."""
    others = [name for name in sample.modalities if name != "text"]
    kept = [subset for size in range(len(others), -1, -1) for subset in combinations(others, size)]
    losses = [word_loss(learner, sample, tuple(name for name in others if name not in subset)) for subset in kept]
    return [loss for loss in losses if loss is not None]


def searches(
    sample: Sample, own: Mapping[str, np.ndarray], gallery: Mapping[str, np.ndarray], concepts: np.ndarray
) -> list[Search]:
    """Every modality of the sample looked for with every subset of its others, the largest subset first.

    own: per modality the sample's point [P].  gallery: per modality the points [n, P] of other samples, rows of NaN
    where one lacks it; concepts [n].  Items of the sample's own concept do not count against it.
    """
    found = []
    for target in own:
        choices = gallery[target][(concepts != sample.item.concept) & np.isfinite(gallery[target][:, 0])]
        others = [name for name in own if name != target]
        for size in range(len(others), 0, -1):
            for given in combinations(others, size):
                query = F.normalize(torch.from_numpy(sum(own[name] for name in given)), dim=0).numpy()
                similarity = float(query @ own[target])
                rank = 1 + int((choices @ query >= similarity).sum())
                found.append(Search(target, given, similarity, rank, 1 + len(choices)))
    return found

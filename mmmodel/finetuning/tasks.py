"""What each task learns from and is scored by.   B samples, C outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmmodel.embed import make_batch, sample_vectors, segment_vectors
from mmmodel.features import Features, Item
from mmmodel.finetuning import scores
from mmmodel.finetuning.config import FinetuneConfig
from mmmodel.finetuning.labels import Labels
from mmmodel.finetuning.learner import Aligned, FineTuned, make_loss
from mmmodel.model import autocast


@dataclass(frozen=True)
class Labelled:
    """Samples of the splits that learn and choose, with their labels."""

    features: Features
    train: list[Item]
    validation: list[Item]
    test: list[Item]  # may be empty; never seen before the end
    values: dict[str, Any]  # key -> label, as labels.read gives it
    labels: Labels

    def of(self, items: Sequence[Item]) -> list[Any]:
        return [self.values[item.key] for item in items]


@dataclass(frozen=True)
class Task:
    """How a learner learns from its samples, and how good it is."""

    loss: Callable[[np.ndarray, np.random.Generator | None], Tensor]  # of these rows of data.train, augmented by rng
    validate: Callable[[], dict[str, float]]
    untrained: Callable[[], dict[str, float]]  # scores alike, NaN where any would be: labels alone decide that


def make_task(learner: FineTuned | Aligned, data: Labelled, config: FinetuneConfig) -> Task:
    if isinstance(learner, Aligned):
        return _retrieval(learner, data, config)
    return (_probe if config.freeze == "encoder" else _outputs)(learner, data, config)


def evaluate_on(learner: FineTuned | Aligned, data: Labelled, items: Sequence[Item]) -> dict[str, float]:
    """Scores of the task on items that have labels."""
    learner.eval()
    if isinstance(learner, Aligned):
        vectors = segment_vectors(learner.model, items, data.features, learner.points)
        return scores.score_retrieval(vectors, relabelled(items, data.values))
    return scores.score(data.labels, predict(learner, data.features, items), data.of(items))


def predict(learner: FineTuned, features: Features, items: Sequence[Item]) -> Tensor:
    """Outputs of the items, float32 [len(items), C]: logits, or the number in units of the training deviation."""
    learner.eval()
    return torch.from_numpy(sample_vectors(learner.model, items, features, learner))


def relabelled(items: Sequence[Item], values: dict[str, Any]) -> list[Item]:
    """Items whose concept is their label: what retrieval counts as the same thing."""
    return [replace(item, concept=values[item.key]) for item in items]


def _outputs(learner: FineTuned, data: Labelled, config: FinetuneConfig) -> Task:
    compare = _against_labels(learner, data, config)

    def loss(rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        batch = make_batch(learner.model, [data.train[i] for i in rows], data.features, rng)
        with autocast(config.device, config.precision):
            outputs = learner(batch)
        return compare(outputs.float(), rows)

    return Task(loss, lambda: evaluate_on(learner, data, data.validation), lambda: _of_zeros(data))


def _probe(learner: FineTuned, data: Labelled, config: FinetuneConfig) -> Task:
    """A frozen encoder reads each sample once, not augmented."""
    compare = _against_labels(learner, data, config)
    device = next(learner.parameters()).device
    learner.eval()
    train, validation = (
        torch.from_numpy(sample_vectors(learner.model, items, data.features, learner.pooled)).to(device)
        for items in (data.train, data.validation)
    )

    def loss(rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        return compare(learner.outputs(_chosen(train, rows)), rows)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        learner.eval()
        return scores.score(data.labels, learner.outputs(validation).cpu(), data.of(data.validation))

    return Task(loss, validate, lambda: _of_zeros(data))


def _retrieval(learner: Aligned, data: Labelled, config: FinetuneConfig) -> Task:
    items = relabelled(data.train, data.values)

    def loss(rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        batch = make_batch(learner.model, [items[i] for i in rows], data.features, rng)
        with autocast(config.device, config.precision):
            return learner(batch)

    def validate() -> dict[str, float]:
        return evaluate_on(learner, data, data.validation)

    return Task(loss, validate, validate)


def _of_zeros(data: Labelled) -> dict[str, float]:
    items = data.validation
    return scores.score(data.labels, torch.zeros(len(items), data.labels.outputs), data.of(items))


def _against_labels(
    learner: FineTuned, data: Labelled, config: FinetuneConfig
) -> Callable[[Tensor, np.ndarray], Tensor]:
    """loss(outputs [B, C], rows of data.train)."""
    values, device = data.of(data.train), next(learner.parameters()).device
    loss = make_loss(data.labels, values, balance=config.balance, device=device)
    targets = data.labels.encode(values).to(device)
    return lambda outputs, rows: loss(outputs, _chosen(targets, rows))


def _chosen(table: Tensor, rows: np.ndarray) -> Tensor:
    """table[rows], which on a GPU would wait for it."""
    return table.index_select(0, torch.from_numpy(rows).to(table.device, non_blocking=True))

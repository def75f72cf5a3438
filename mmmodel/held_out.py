"""What the objectives make of concepts that training never saw: losses and accuracies, without a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from mmmodel.batches import Sampler, collate
from mmmodel.features import Item
from mmmodel.pretraining import Corpus, Pretraining

BATCH = 64
BATCHES = 24  # some 1,500 samples, each picture several times in different languages and company


@torch.no_grad()
def figures(learner: Pretraining, corpus: Corpus, items: Sequence[Item], *, batches: int = BATCHES) -> dict[str, float]:
    """Mean over batches of what the run's objectives report, named objective/figure; nothing is augmented.

    Negatives, and what is hidden, are drawn as in training, by fixed seeds.  The objective `meaning` is left out: it
    knows training concepts alone.
    """
    learner.eval()
    sampler = Sampler(items, batch_size=min(BATCH, len({item.group for item in items})), seed=0)
    model, device = learner.model, learner.model.token_table.device
    found: dict[str, list[float]] = {}
    for number in range(batches):
        rng = np.random.default_rng([number, 6])
        batch = collate(
            [items[i] for i in sampler.batch(number)], corpus.features, model.front_ends, model.special_tokens
        )
        prepared = learner.prepare(batch, rng, None)
        weights = {name: weight for name, weight in prepared.weights.items() if name != "meaning"}
        for name, value in learner(batch.to(device), dataclasses.replace(prepared, weights=weights))[1].items():
            found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}

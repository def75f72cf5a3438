"""What the objectives make of samples that training never saw: losses and accuracies, without a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor, nn

from mmmodel import distributed
from mmmodel.batches import Sampler, collate
from mmmodel.features import Item
from mmmodel.metrics import merged
from mmmodel.pretraining import Corpus, Pretraining

BATCH = 64
BATCHES = 24  # some 1,500 samples, each picture several times in different languages and company

MEANING = {  # of a figure, by its objective and the first part of its name
    "contrastive/loss": "cross entropy of alignment",
    "contrastive/top1": "nearest in its batch is right",
    "masked_text/loss": "cross entropy of hidden pieces",
    "masked_text/accuracy": "hidden pieces read right",
    "masked_image/loss": "error of hidden cells",
    "masked_image/of_mean": "that over the best constant's",
    "masked_audio/loss": "error of hidden frames",
    "masked_audio/of_mean": "that over the best constant's",
    "matching/loss": "cross entropy of yes or no",
    "matching/accuracy": "yes and no right, halves alike",
}


@torch.no_grad()
def figures(learner: Pretraining, corpus: Corpus, items: Sequence[Item], *, batches: int = BATCHES) -> dict[str, float]:
    """Mean over batches of what the run's objectives report, named objective/figure; nothing is augmented.

    Negatives, and what is hidden, are drawn as in training, by fixed seeds.  A batch in which an objective finds
    nothing does not count for it: its loss there is 0.  Nor does one of a single concept for what compares samples.
    `meaning` is left out, as it knows training concepts alone.
    Under torchrun every process reads its part of each batch, and all get the mean; {} if there are fewer groups of
    samples than processes.
    """
    learner.eval()
    if not (size := batch_size(items)):
        return {}
    sampler = Sampler(items, batch_size=size, seed=0)
    model, device = learner.model, learner.model.token_table.device
    found: dict[str, list[Tensor]] = {}
    for number in range(batches):
        everyone = [items[i] for i in sampler.batch(number)]
        own = distributed.own(everyone)
        batch = collate(own, corpus.features, model.front_ends, model.special_tokens)
        prepared = learner.prepare(batch, distributed.generator(number, 6), None)
        # alike on all ranks: alignment's points go round among them
        weights = {
            name: weight
            for name, weight in prepared.weights.items()
            if name != "meaning" and _asks(learner.objectives[name], everyone)
        }
        for name, value in learner(batch.to(device), dataclasses.replace(prepared, weights=weights))[1].items():
            if learner.objectives[name.partition("/")[0]].finds(own):
                found.setdefault(name, []).append(value.to(device))
    # All in one copy, at the end: each read waits for a GPU, and lets it run dry.
    means = [torch.stack(values).double().mean() for values in found.values()]
    read = torch.stack(means).tolist() if means else []
    return merged(distributed.everyone(dict(zip(found, read, strict=True))))


def batch_size(items: Sequence[Item]) -> int:
    """Of the batches of `figures`, at least a sample for each process; 0 if there are too few."""
    size = min(max(BATCH, distributed.size()), distinct(items))
    return size if size >= distributed.size() else 0


def distinct(items: Sequence[Item]) -> int:
    """How many of them a batch can hold: one of each group."""
    return len({item.group for item in items})


def _asks(objective: nn.Module, items: Sequence[Item]) -> bool:
    """Whether these items may be got wrong: one alone is the nearest of its batch, and has no negatives."""
    alone = getattr(objective, "compares", False) and len({item.concept for item in items}) < 2
    return not alone and objective.finds(items)


def is_score(name: str) -> bool:
    """Whether a figure says how well an objective does: a parameter such as the scale is none."""
    return "/".join(name.split("/")[:2]) in MEANING


def guesses(learner: Pretraining) -> dict[str, float]:
    """What some figures are of a model that knows nothing, where that does not hang on the data."""
    pieces = learner.model.tokenizer.get_vocab_size()
    known = {
        "masked_text/loss": math.log(pieces),
        "masked_text/accuracy": 1 / pieces,
        "masked_image/of_mean": 1.0,
        "masked_audio/of_mean": 1.0,
        "matching/loss": math.log(3) - 2 / 3 * math.log(2),  # of three pairs one is true
        "matching/accuracy": 0.5,
    }
    return {name: value for name, value in known.items() if name.partition("/")[0] in learner.objectives}


def table(found: dict[str, float], known: dict[str, float]) -> Table:
    """found as `figures` gives them, known as `guesses`; what is no score has no row."""
    made = Table(title="Objectives on these samples", box=None, padding=(0, 1, 0, 0), header_style="bold")
    made.add_column("figure", no_wrap=True)
    made.add_column("held out", justify="right", no_wrap=True)
    made.add_column("a guess", justify="right", no_wrap=True)
    made.add_column("what it is")
    for name, value in found.items():
        if is_score(name):
            guess = f"{known[name]:.3f}" if name in known else ""
            made.add_row(name, f"{value:.3f}", guess, MEANING["/".join(name.split("/")[:2])])
    return made

"""The model with its objectives: one batch in, one loss out; and how a run is set up from its configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmmodel import distributed, features, language_model, objectives, settings
from mmmodel.batches import Batch, collate, concept_number
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.data.loader import NothingSelectedError, ShardDataset
from mmmodel.data.recordings import hold_out
from mmmodel.features import Features, Item
from mmmodel.frontends import special_names
from mmmodel.frontends.text import load_language_model_tokenizer, train_tokenizer
from mmmodel.model import Model
from mmmodel.objectives.meaning import UntaughtError
from mmmodel.objectives.views import MaskedBatch, Views, mask_batch

PREPARED = ("stamps", "synthetic")  # data sets that are made in the cache
SYNTHETIC_SAMPLES = 2000
BYTES = 256  # of which any text is made; all are in the vocabulary


class Pretraining(nn.Module):
    """Model and objectives, initialised from config.seed."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # not the GPUs' too, as torch.manual_seed
            self.model = Model(config.model, tokenizer)
            self.objectives = objectives.build(config, self.model)

    def prepare(self, batch: Batch, rng: np.random.Generator, step: int | None = 0) -> Prepared:
        """What the objectives that run at `step` draw for a batch; on the host.  None: all of them, at full weight."""
        weights = {
            name: weight
            for name, objective in self.objectives.items()
            if (weight := objectives.weight_at(objective.config, step, self.config.steps))
        }
        active = {name: self.objectives[name] for name in weights}
        hiding = {objective.hides: objective for objective in active.values() if hasattr(objective, "hides")}
        share = self.config.objectives.masked_share
        masked = mask_batch(batch, self.model.front_ends, hiding, share, rng) if hiding else None
        inputs = {
            name: objective.prepare(batch, rng) for name, objective in active.items() if hasattr(objective, "prepare")
        }
        return Prepared(weights, masked, inputs)

    def forward(self, batch: Batch, prepared: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the losses, and detached figures named objective/figure."""
        masked = prepared.masked and prepared.masked.to(self.model.token_table.device)
        covers = {o.hides: o.cover for o in self.objectives.values() if hasattr(o, "cover")}
        views = Views(self.model, batch, masked, covers)
        total, metrics = None, {}
        for name, weight in prepared.weights.items():
            loss, figures = self.objectives[name](views, prepared.inputs.get(name))
            total = weight * loss if total is None else total + weight * loss
            metrics[f"{name}/loss"] = loss.detach()
            metrics |= {f"{name}/{figure}": value.detach() for figure, value in figures.items()}
        if total is None:  # no objective's schedule has this step
            total = 0 * self.model.token_table.sum()
        return total, metrics


@dataclass(frozen=True)
class Prepared:
    """What a step needs beside its batch; on the host."""

    weights: dict[str, float]  # of the objectives that run
    masked: MaskedBatch | None
    inputs: dict[str, Any]  # per objective, what it drew


@dataclass(frozen=True)
class Corpus:
    """All a run reads: the features, and which sample has which."""

    items: list[Item]
    features: Features

    def split(self, name: str) -> list[Item]:
        return [item for item in self.items if item.split == name]


def located(name: str) -> str:
    """A data set's name as a run keeps it: a folder by its absolute path, so that it is found from anywhere.

    Raises ConfigError for an empty name, which would be the folder that the process happens to be in.
    """
    if not str(name).strip():
        raise ConfigError(f"data is {name!r}, expected stamps, synthetic, or a folder of shards")
    return name if name in PREPARED else os.path.abspath(Path(name).expanduser())


def find_data(name: str) -> Path:
    """Folder of shards: "stamps" and "synthetic" are prepared in the cache if they are not there; else a path."""
    if name == "stamps":
        from mmmodel.data import stamps

        return stamps.prepare()
    if name == "synthetic":
        from mmmodel.data import synthetic

        folder = settings.current().cache / f"synthetic-{SYNTHETIC_SAMPLES}"
        if not (folder / "manifest.json").exists():
            synthetic.prepare(folder, samples=SYNTHETIC_SAMPLES, seed=0)
        return folder
    return Path(located(name))


def open_data(config: PretrainConfig) -> ShardDataset:
    """The samples that a run reads.  Raises ConfigError as `open_shards` does."""
    try:
        return open_shards(config.data, config.languages)
    except NothingSelectedError as error:
        raise ConfigError(f"{error}; --set languages= reads samples of any") from error


def open_shards(name: str, languages: Sequence[str] = (), split: str | None = None) -> ShardDataset:
    """Of the data set `name` as in `find_data`.  Raises ConfigError if nothing is selected, saying what there is."""
    return ShardDataset(find_data(name), split, languages or None)


def check_vocabulary(config: PretrainConfig) -> None:
    """Raises ConfigError for fewer word pieces than a tokenizer of our own has before it learns one."""
    special = special_names(config.model.modalities)
    size, least = config.model.text.vocab_size, BYTES + len(special)
    if size < least and not (config.language_model or config.model.text.encoder or config.start):
        raise ConfigError(
            f"config: model.text.vocab_size is {size}, expected at least {least}: {BYTES} bytes and {len(special)} "
            "special tokens"
        )


def check_teacher(config: PretrainConfig) -> None:
    """Raises ConfigError if the run has the objective `meaning`, and its language model is not there."""
    if config.objectives.meaning.weight:
        try:
            language_model.find(config.objectives.meaning.teacher)
        except ConfigError as error:
            raise ConfigError(f"objectives: meaning has no teacher: {error}") from error


def make_tokenizer(config: PretrainConfig, dataset: ShardDataset) -> Tokenizer:
    """The language model's, or one trained on the training captions alone: the test set's words must stay unseen."""
    special = special_names(config.model.modalities)
    if folder := config.language_model or config.model.text.encoder:
        return load_language_model_tokenizer(Path(folder) / "tokenizer.json", special)
    captions = [text for _, text in features.read_captions(dataset, "train")]
    return train_tokenizer(captions, config.model.text.vocab_size, special)


def load_corpus(config: PretrainConfig, dataset: ShardDataset, model: Model) -> Corpus:
    items, arrays = features.prepare(dataset, model.front_ends, threads=config.threads)
    return Corpus(hold_out(items, config.hold_out_speech), arrays)


def teach(learner: Pretraining, config: PretrainConfig) -> None:
    """Ask the language model of the objective `meaning`, if the run has it, about the training concepts.

    A concept's vector is the mean over its captions.  Raises UntaughtError if there is none, ConfigError for a model
    that cannot be read.
    """
    if "meaning" not in learner.objectives:
        return
    chosen = config.objectives.meaning
    try:
        dataset = open_shards(config.data, (chosen.language,), "train")
    except ConfigError as error:
        raise UntaughtError(f"objectives: meaning has no captions to read: {error}") from error
    if not (said := features.read_captions(dataset, "train")):
        where = f"none in {chosen.language!r} in {dataset.path}"
        raise UntaughtError(f"objectives: meaning has no captions to read: {where}")
    try:
        vectors = language_model.sentence_vectors(chosen.teacher, [text for _, text in said])
    except ConfigError as error:
        raise ConfigError(f"objectives: meaning has no teacher: {error}") from error
    names = sorted({concept for concept, _ in said})
    row = {name: i for i, name in enumerate(names)}
    rows = torch.tensor([row[concept] for concept, _ in said])
    sums = torch.zeros(len(names), vectors.shape[1]).index_add_(0, rows, vectors)
    numbers = torch.tensor([concept_number(name) for name in names])
    learner.objectives["meaning"].teach(numbers, sums / torch.bincount(rows).unsqueeze(1))


def make_step(learner: Pretraining, corpus: Corpus, items: list[Item], step: int) -> tuple[Batch, Prepared]:
    """The batch of a step, augmented, and the objectives' draws: all randomness comes from (seed, step, rank)."""
    config, model = learner.config, learner.model
    rng = distributed.generator(config.seed, step, 2)
    batch = collate(items, corpus.features, model.front_ends, model.special_tokens, rng if config.augment else None)
    return batch, learner.prepare(batch, rng, step)

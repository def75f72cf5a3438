"""The parts of the benchmark: each computes one run's outcome for every test sample, as plain numbers.

E model width, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmkernels.ops.packing.api import segment_mean
from mmmodel import evaluate, pretraining
from mmmodel.batches import Batch
from mmmodel.benchmark.intervals import balanced_accuracy
from mmmodel.benchmark.protocol import ARMS, INPUTS, Protocol, budget_name
from mmmodel.data.recordings import RECORDINGS
from mmmodel.embed import segment_vectors
from mmmodel.export import Run
from mmmodel.features import Item
from mmmodel.finetuning import labels, weights
from mmmodel.finetuning.loop import train
from mmmodel.finetuning.run import build, fresh
from mmmodel.finetuning.tasks import Labelled, predict
from mmmodel.pretraining import Corpus, Pretraining

Outcome = dict[str, Any]
KNOWN_TASKS = {"known_speech_to_text": ("audio", "text"), "known_speech_to_image": ("audio", "image")}


@dataclass(frozen=True)
class Subject:
    """One pretrained run, opened, and its data."""

    run: Run
    number: int
    corpus: Corpus
    metas: dict[str, dict[str, Any]]

    def learner(self, arm: str) -> Pretraining:
        """The model as it was before pretraining, or after."""
        if arm == "pretrained":
            return weights.learner_of(self.run)
        return Pretraining(self.run.config, self.run.tokenizer).eval()


def open_subject(run: Run, number: int) -> Subject:
    dataset = pretraining.open_data(run.config)
    corpus = pretraining.load_corpus(run.config, dataset, Pretraining(run.config, run.tokenizer).model)
    return Subject(run, number, corpus, dict(zip(dataset.keys, dataset.metas, strict=True)))


def retrieval(subject: Subject) -> Outcome:
    """task -> language -> {before_hit of each arm, concepts, chance}: unseen concepts, and new recordings of known."""
    test, recordings = subject.corpus.split("test"), subject.corpus.split(RECORDINGS)
    found: dict[str, dict[str, Outcome]] = {}
    for arm in ARMS:
        learner = subject.learner(arm)
        outcomes = evaluate.ranks(evaluate.embed(learner, subject.corpus, test), test)
        if recordings:
            outcomes |= known_ranks(learner, subject.corpus, recordings)
        for (task, language), ranks in outcomes.items():
            entry = found.setdefault(task, {}).setdefault(language, {"chance": ranks.chance})
            entry["concepts"] = ranks.concepts.tolist()
            entry[arm] = ranks.before_hit.tolist()
    return found


def known_ranks(learner: Pretraining, corpus: Corpus, recordings: Sequence[Item]) -> dict:
    """As `evaluate.ranks`: recordings that training never heard ask for the captions and pictures that it did see."""
    languages = {item.language for item in recordings}
    gallery = [
        replace(item, rows={name: row for name, row in item.rows.items() if name != "audio"})
        for item in corpus.split("train")
        if item.language in languages
    ]
    items = [*recordings, *gallery]
    return evaluate.ranks(evaluate.embed(learner, corpus, items), items, KNOWN_TASKS)


def probe(subject: Subject, protocol: Protocol) -> list[Outcome]:
    """Linear probes of frozen features: {arm, inputs, labels, seed, tried: {C: {validation, correct of each sample}}}.

    Features are the mean hidden state of each modality read alone, beside one another; multinomial logistic regression
    in which classes weigh the same.  Features are extracted once; all seeds and budgets share them.
    """
    data = labelled(subject, protocol)
    rows = []
    for arm in ARMS:
        learner = subject.learner(arm)
        for inputs, modalities in INPUTS.items():
            x = {
                split: features(learner, _showing(items, modalities), subject.corpus)
                for split, items in (("train", data.train), ("validation", data.validation), ("test", data.test))
            }
            for per_class in protocol.labels_per_class:
                for seed in range(protocol.seeds if per_class else 1):  # all labels: nothing is drawn
                    rows.append(
                        {
                            "arm": arm,
                            "inputs": inputs,
                            "labels": budget_name(per_class),
                            "seed": seed,
                            "tried": _tried(x, data, per_class, seed, protocol),
                        }
                    )
    return rows


def features(learner: Pretraining, items: Sequence[Item], corpus: Corpus) -> np.ndarray:
    """Mean hidden states per modality, [n, E per modality that any item has]; 0 where an item lacks one."""
    model = learner.model

    def means(batch: Batch):
        return segment_mean(model(batch, model.isolated()), batch.layout)

    vectors = segment_vectors(model, items, corpus.features, means)
    present = [vector for vector in vectors.values() if np.isfinite(vector).any()]
    return np.nan_to_num(np.concatenate(present, axis=1))


def finetuned(subject: Subject, protocol: Protocol, inputs: str, per_class: int, seed: int, arm: str) -> Outcome:
    """One full fine-tuning: {correct of each test sample, validation score, epochs}.

    From scratch every (run, seed) starts from other weights; both arms of a seed see the same labels in the same order.
    """
    config = replace(
        protocol.finetune[arm],
        label=protocol.label,
        labels_per_class=per_class,
        seed=seed,
        from_scratch=arm == "baseline",
    )
    data = labelled(subject, protocol)
    kept = labels.few(data.train, data.values, per_class, seed) if per_class else data.train
    modalities = INPUTS[inputs]
    data = replace(
        data,
        train=_showing(kept, modalities),
        validation=_showing(data.validation, modalities),
        test=_showing(data.test, modalities),
    )
    base = fresh(subject.run.config, subject.run.tokenizer, 1000 * subject.number + seed)
    learner, _ = build(base, subject.run, data.labels, config)
    outcome = train(learner, data, config)
    outputs = predict(learner, data.features, data.test)
    found = np.asarray(data.labels.classes)[outputs.argmax(dim=1).numpy()]
    return {
        "arm": arm,
        "inputs": inputs,
        "labels": budget_name(per_class),
        "seed": seed,
        "correct": (found == np.asarray(data.of(data.test))).astype(int).tolist(),
        "validation": outcome.validation["balanced_accuracy"],
        "best_epoch": outcome.best_epoch,
        "epochs": len(outcome.history),
    }


def labelled(subject: Subject, protocol: Protocol) -> Labelled:
    """Each picture once, with what is said of it in one language, and its category."""
    items = labels.first_of_groups(
        [item for item in subject.corpus.items if item.language == protocol.language and "image" in item.rows]
    )
    values = labels.read(items, subject.metas, "classification", protocol.label)
    split = {
        name: [item for item in items if item.split == name and item.key in values]
        for name in ("train", "validation", "test")
    }
    rule = labels.fit([values[item.key] for item in split["train"]], "classification")
    return Labelled(subject.corpus.features, split["train"], split["validation"], split["test"], values, rule)


def _showing(items: Sequence[Item], modalities: Sequence[str]) -> list[Item]:
    """Items of these modalities alone.  One that has none of them stays, so that all inputs are scored on the same."""
    return [replace(item, rows={name: row for name, row in item.rows.items() if name in modalities}) for item in items]


def _tried(
    x: dict[str, np.ndarray], data: Labelled, per_class: int, seed: int, protocol: Protocol
) -> dict[str, Outcome]:
    """Per strength the balanced accuracy on validation, and which test samples are right."""
    number = {item.key: i for i, item in enumerate(data.train)}
    kept = labels.few(data.train, data.values, per_class, seed) if per_class else data.train
    own = x["train"][[number[item.key] for item in kept]]
    validation, test = np.asarray(data.of(data.validation)), np.asarray(data.of(data.test))
    found = {}
    for strength in protocol.strengths:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
        ).fit(own, data.of(kept))
        found[str(strength)] = {
            "validation": balanced_accuracy(model.predict(x["validation"]) == validation, validation),
            "correct": (model.predict(x["test"]) == test).astype(int).tolist(),
        }
    return found

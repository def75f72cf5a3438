"""`mmmodel finetune`: from a pretrained run and labelled shards to a fine-tuned model and its report."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from mmmodel import atomic, configs, export, limits, pretraining, run_folder
from mmmodel import features as feature_store
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.data.loader import ShardDataset
from mmmodel.data.recordings import draw
from mmmodel.data.shards import shard_stamps
from mmmodel.export import Run
from mmmodel.features import Features, Item
from mmmodel.finetuning import labels as label_rules
from mmmodel.finetuning import weights
from mmmodel.finetuning.config import FinetuneConfig, check
from mmmodel.finetuning.labels import Labels
from mmmodel.finetuning.learner import Aligned, FineTuned
from mmmodel.finetuning.loop import train
from mmmodel.finetuning.scores import MAIN
from mmmodel.finetuning.tasks import Labelled, evaluate_on
from mmmodel.finetuning.weights import Loaded
from mmmodel.limits import CheckpointError
from mmmodel.model import check_impl

logger = logging.getLogger(__name__)

CONTRASTIVE = "objectives.contrastive."  # the name of the retrieval head in files, pretrained or fine-tuned
READ = ("task", "visibility", "dropout", "seed", "threads")  # fields that a model is read by; others trained it
WHERE = ("threads", "device")  # fields that say where it is computed: one that was stopped may go on elsewhere
HELD_OUT = 0.1  # share of the training groups that validate where the data has no validation split


def finetune(run: Path | str, config: FinetuneConfig, out: Path | str, *, impl: str | None = None) -> dict[str, Any]:
    """Fine-tune the model of `run`; writes model.safetensors, metrics.jsonl, finetune.json and report.json to `out`.

    impl: as in `export.open_run`, and kept in what is written.

    Stopped, the same call goes on from the last step that was kept: after SIGTERM (SystemExit with status 143) and
    Ctrl-C (KeyboardInterrupt) the one in progress, else that of a checkpoint between epochs.  Returns the report.
    Raises ConfigError for labels or a folder that do not fit and under torchrun, CheckpointError for weights.
    """
    started = time.perf_counter()
    check(config)
    if distributed.is_torchelastic_launched():
        raise ConfigError("finetune: is one process, expected to be started without torchrun")
    limits.check_device(config.device, "finetune")
    torch.set_num_threads(config.threads)
    config = replace(config, data=config.data and pretraining.located(config.data))
    source, out = export.open_run(run, impl=impl), Path(out)
    check_impl(source.config.model.impl, config.device, config.precision)
    with run_folder.alone_in(out, "finetune"):
        return _finetune(source, config, out, started)


def _finetune(source: Run, config: FinetuneConfig, out: Path, started: float) -> dict[str, Any]:
    _refuse_other(out, config, source)
    base = fresh(source.config, source.tokenizer, config.seed)
    stamps = shard_stamps(pretraining.find_data(config.data or source.config.data))
    data, counts = read_labelled(source.config, base.model, config)
    learner, loaded = build(base, source, data.labels, config)
    logger.info("%s", "from scratch: no tensor loaded" if loaded is None else loaded.summary())
    logger.info("%s", ", ".join(f"{name} {count}" for name, count in counts.items()))
    for split, items in (("validation", data.validation), ("test", data.test)):
        if new := label_rules.unseen(data.of(items), data.labels):
            words = "%s: %d of %d samples have a label that no training sample has, such as %r: it is never predicted"
            logger.warning(words, split, len(new), len(items), new[0])
    learner.to(config.device)
    settings = {name: value for name, value in asdict(config).items() if name not in WHERE}
    about = {"from": export.checksum(source.tensors), "config": settings, "labels": asdict(data.labels)} | counts
    about["shards"] = stamps
    checkpoints = _checkpoints(out / ".checkpoints", about)
    with run_folder.writing(out):
        outcome = train(learner, data, config, checkpoints, out / "metrics.jsonl")
    try:
        with torch.no_grad():
            test = evaluate_on(learner, data, data.test) if data.test else None
    except ConfigError as error:
        if config.task != "retrieval":  # whose test samples may hold no pair; what was trained is kept
            raise
        logger.warning("the test samples are not scored: %s", error)
        test = None
    if undefined := [name for name, value in (test or {}).items() if not math.isfinite(value)]:  # JSON has no NaN
        logger.warning("the %d test samples have no %s", len(data.test), ", ".join(undefined))
        test = {name: value for name, value in test.items() if name not in undefined}
    atomic.write_json(out / "finetune.json", asdict(config))  # not before it is done: a mistake leaves the folder free
    with run_folder.writing(out):
        save(out / export.FILE, learner, source.config, config, data.labels)
    report = {
        "task": config.task,
        "label": config.label,
        "score": MAIN[config.task],
        "validation": outcome.validation,
        "test": test,
        "best_epoch": outcome.best_epoch,
        "epochs": len(outcome.history),
        "counts": counts,
        "classes": list(data.labels.classes),
        "loaded": None if loaded is None else asdict(loaded),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }
    atomic.write_json(out / "report.json", report)
    shutil.rmtree(checkpoints)
    return report


def _checkpoints(folder: Path, about: dict[str, Any]) -> Path:
    """Where this very fine-tuning keeps how far it came; what a stopped one of other settings left is removed."""
    path, about = folder / "about.json", json.loads(json.dumps(about))
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs == about:
            return folder
        found = run_folder.differences(theirs, about) or "samples"
        logger.warning("%s: begins anew, for what was stopped there had other %s", folder.parent, found)
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError) as error:
        logger.warning("%s: begins anew, for %s does not read: %s", folder.parent, path.name, error)
    shutil.rmtree(folder, ignore_errors=True)
    atomic.write_json(path, about)
    return folder


def fresh(config: PretrainConfig, tokenizer, seed: int) -> pretraining.Pretraining:
    """A model of the configuration with the initial weights of a seed."""
    return pretraining.Pretraining(replace(config, seed=seed), tokenizer)


def build(
    base: pretraining.Pretraining, source: Run, labels: Labels, config: FinetuneConfig
) -> tuple[FineTuned | Aligned, Loaded | None]:
    """The learner, and what was loaded into it: None from scratch.  Heads of pretraining that it has no use for go."""
    loaded = None
    where = str(source.path)
    if not config.from_scratch:
        loaded = weights.load_into(base.model, source.tensors, where=where, prefix="model.", partial=config.partial)
    if config.task != "retrieval":
        return FineTuned(base.model, labels.outputs, visibility=config.visibility, dropout=config.dropout), loaded
    if "contrastive" not in base.objectives:
        raise ConfigError("finetune: retrieval needs the contrastive objective, whose weight is 0 in this run")
    head = base.objectives["contrastive"]
    if loaded is not None and any(name.startswith(CONTRASTIVE) for name in source.tensors):
        more = weights.load_into(head, source.tensors, where=where, prefix=CONTRASTIVE, partial=config.partial)
        loaded = Loaded(*(a + b for a, b in zip(asdict(loaded).values(), asdict(more).values(), strict=True)))
    return Aligned(base.model, head), loaded


def read_labelled(
    pretrain: PretrainConfig, model: nn.Module, config: FinetuneConfig
) -> tuple[Labelled, dict[str, int]]:
    """The labelled samples of config.data by split, and how many there are.

    Where no sample has the split `validation`, a tenth of the training groups, chosen by name, takes its place.
    """
    languages = config.languages or (() if config.data else pretrain.languages)
    dataset = pretraining.open_shards(config.data or pretrain.data, languages)
    metas = dict(zip(dataset.keys, dataset.metas, strict=True))
    values = label_rules.read(dataset.entries, metas, config.task, config.label)  # before anything is decoded
    items, features = read_samples(dataset, model, config)
    if config.one_per_group:
        items = label_rules.first_of_groups(items)
    splits = _by_split([item for item in items if item.key in values])
    if config.labels_per_class:
        splits["train"] = label_rules.few(splits["train"], values, config.labels_per_class, config.seed)
    labels = label_rules.fit([values[item.key] for item in splits["train"]], config.task)
    counts = {name: len(splits[name]) for name in ("train", "validation", "test")}
    counts["without_label"] = sum(item.key not in values for item in items)
    return Labelled(features, splits["train"], splits["validation"], splits["test"], values, labels), counts


def read_samples(dataset: ShardDataset, model: nn.Module, config: FinetuneConfig) -> tuple[list[Item], Features]:
    """Samples as the fine-tuned model sees them: config.modalities alone, and for qa the question as text."""
    if unknown := set(config.modalities) - set(model.front_ends):
        raise ConfigError(f"finetune: the model reads {', '.join(model.front_ends)}, not {', '.join(unknown)}")
    items, features = feature_store.prepare(dataset, model.front_ends, threads=config.threads)
    if config.task == "qa" and config.question:
        metas = dict(zip(dataset.keys, dataset.metas, strict=True))
        items, features = with_questions(items, features, metas, model, config.question)
    if config.modalities:
        limited = label_rules.limited_to(items, config.modalities)
        if len(limited) < len(items):
            logger.info("left out: %d samples without %s", len(items) - len(limited), " or ".join(config.modalities))
        items = limited
    return items, features


def with_questions(
    items: Sequence[Item], features: Features, metas: Mapping[str, Mapping[str, Any]], model: nn.Module, field: str
) -> tuple[list[Item], Features]:
    """Items whose text is the question in a field of KEY.json; those without one are left out."""
    if "text" not in model.front_ends:
        raise ConfigError("finetune: a question is text, which the model does not read")
    asked = {key: said.strip() for key, meta in metas.items() if isinstance(said := meta.get(field), str)}
    kept = [item for item in items if asked.get(item.key)]
    if not kept:
        raise ConfigError(f"finetune: no sample has a question {field!r}")
    if len(kept) < len(items):
        logger.info("left out: %d samples without a question %r, or with a blank one", len(items) - len(kept), field)
    texts = [model.front_ends["text"].prepare(asked[item.key]) for item in kept]
    stored = Features.of({"text": texts})
    merged = Features({**features.flat, **stored.flat}, {**features.shapes, **stored.shapes})
    return [replace(item, rows={**item.rows, "text": i}) for i, item in enumerate(kept)], merged


def save(
    path: Path, learner: FineTuned | Aligned, pretrain: PretrainConfig, config: FinetuneConfig, labels: Labels
) -> None:
    """As a pretrained run's file, with what the head means beside it; atomically."""
    tensors = {_file_name(learner, name): tensor for name, tensor in learner.state_dict().items()}
    about = json.dumps({"config": asdict(config), "labels": asdict(labels)})
    export.write(path, tensors, pretrain, learner.model.tokenizer, finetune=about)


def load(path: Path | str) -> tuple[FineTuned | Aligned, Labels, FinetuneConfig]:
    """What `save` wrote, in eval mode.  Raises CheckpointError for a file that is damaged or not fine-tuned."""
    return restore(export.open_run(path))


def restore(source: Run) -> tuple[FineTuned | Aligned, Labels, FinetuneConfig]:
    """`load`, of a file that is open."""
    if source.finetuning is None:
        raise CheckpointError(f"{source.path}: is not fine-tuned; `mmmodel finetune` writes such files")
    try:
        read = json.loads(source.finetuning)
        config = configs.from_dict(read["config"], FinetuneConfig)
        limits.check(config, "finetune", fields=READ)
        labels = configs.from_dict(read["labels"], Labels)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{source.path}: its fine-tuning does not read: {error}") from error
    base = fresh(source.config, source.tokenizer, config.seed)
    learner, _ = build(base, source, labels, replace(config, from_scratch=True))
    names = {_file_name(learner, name): name for name in learner.state_dict()}
    tensors = {names.get(name, name): tensor for name, tensor in source.tensors.items()}
    weights.load_into(learner, tensors, where=str(source.path))
    return learner.eval(), labels, config


def _file_name(learner: nn.Module, name: str) -> str:
    if isinstance(learner, Aligned) and name.startswith("head."):
        return CONTRASTIVE + name.removeprefix("head.")
    return name


def _by_split(items: Sequence[Item]) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    for item in items:
        splits.setdefault(item.split, []).append(item)
    if not splits["validation"]:
        held = {item.group for item in splits["train"] if draw("validation", item.group) < HELD_OUT}
        splits["validation"] = [item for item in splits["train"] if item.group in held]
        splits["train"] = [item for item in splits["train"] if item.group not in held]
    for name in ("train", "validation"):
        if not splits[name]:
            raise ConfigError(f"finetune: no labelled sample is left for {name}; there are {len(items)} in all")
    return splits


def _refuse_other(out: Path, config: FinetuneConfig, source: Run) -> None:
    """Raises ConfigError unless `out` is new, or holds a fine-tuning of the same configuration, which is done again."""
    path = out / "finetune.json"
    if out.resolve() == source.path.parent.resolve():
        raise ConfigError(f"finetune: {out} is the run to start from; choose another --out")
    if path.exists():
        try:
            theirs = asdict(configs.from_dict(json.loads(path.read_text(encoding="utf-8")), FinetuneConfig))
            theirs["data"] = theirs["data"] and pretraining.located(theirs["data"])  # older ones: as it was typed
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"finetune: {path} does not read: {error}; choose another --out") from error
        if (out / export.FILE).exists() and (found := run_folder.differences(theirs, asdict(config))):
            raise ConfigError(f"finetune: {out} holds a fine-tuning with other {found}; choose another --out")
    elif (out / "config.json").exists():
        raise ConfigError(f"finetune: {out} holds a pretraining run; choose another --out")

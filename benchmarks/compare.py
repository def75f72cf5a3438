"""python -m benchmarks compare BASELINE NEW: which of our rows got slower, whatever the machine does meanwhile.

Never by absolute time.  A row's *score* is its speed over a calibration measured in the same run:

* a document of `benchmarks OP --json`, or of a stage of `benchmarks gpu`: its ratio to the peers of its case that both
  runs timed, which took turns with it sample by sample (their geometric mean); where no peer is in both, its percent of
  the limit of that run
* a file of `pytest benchmarks --benchmark-json`: the calibration call that ran beside that test

A row regressed where new score / old score is below 1 - threshold, by more than the medians are uncertain, and where it
is wrong or fails in the new run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import schema
from benchmarks.harness import BROKEN, PREFIX, notch
from benchmarks.report import documents

THRESHOLD = 0.15  # a fresh process alone moves a CPU row by up to a tenth: other addresses, other pages
Key = tuple[str, ...]
FACTS = ("gpu", "cpu", "threads", "torch", "triton")  # of the environment: what moves ratios besides our code


@dataclass(frozen=True)
class Score:
    """Time for one unit of work, and of what it can be measured by in the same run; any unit, if one and the same."""

    time: float
    uncertain: float
    beside: dict[str, tuple[float, float]]  # name -> (time, uncertainty)


@dataclass(frozen=True)
class Run:
    """scores: our rows; broken: who was wrong or failed, and how; facts: FACTS, where the file has them."""

    scores: dict[Key, Score]
    broken: dict[Key, str]
    facts: dict[str, str]


@dataclass(frozen=True)
class Change:
    """ratio: new speed over old; allowed: how far below 1 it may be."""

    key: Key
    ratio: float
    allowed: float
    by: str

    @property
    def regressed(self) -> bool:
        return self.ratio < 1 - self.allowed

    @property
    def improved(self) -> bool:
        return self.ratio > 1 / (1 - self.allowed)


def run(baseline: Path, new: Path, threshold: float = THRESHOLD) -> int:
    """Prints what changed; 0 without a regression, 1 with one, 2 where nothing can be compared."""
    try:
        old, now = read(baseline), read(new)
    except ValueError as error:
        print(f"compare: {error}")
        return 2
    for name in FACTS if old.facts and now.facts else ():
        before, after = (facts.get(name, "none") for facts in (old.facts, now.facts))
        if before != after:
            print(f"compare: {name} was {before} and is {after}, which moves ratios too")
    changes, alone = compare(old.scores, now.scores, threshold)
    for change in sorted(changes, key=lambda c: c.ratio):
        if change.regressed or change.improved:
            word = "SLOWER" if change.regressed else "faster"
            name = " / ".join(change.key)
            print(f"{word} {change.ratio:.2f}x (noise up to {change.allowed:.0%}) {name}, by {change.by}")
    # Where nobody could be measured ("all"), ours could not.
    reasons = {key: now.broken.get(key) or now.broken.get((*key[:-1], "all")) for key in sorted(alone)}
    broken = {key: reason for key, reason in reasons.items() if reason and key in old.scores}
    for key, reason in broken.items():
        print(f"BROKEN {' / '.join(key)}: {reason}")
    regressed = sum(change.regressed for change in changes)
    print(
        f"compare: {len(changes)} rows compared, {regressed} slower; {len(broken)} broken; "
        f"{len(alone) - len(broken)} not in both or nothing in common"
    )
    if not changes and not broken:
        print("compare: no row of ours is in both files with something to measure it by")
        return 2
    return 1 if regressed or broken else 0


def read(path: Path) -> Run:
    """Raises ValueError for a file of neither kind."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "benchmarks" in content:
            return Run(_of_pytest(content["benchmarks"]), {}, {})
        document = documents.document_in(content)
    except ValueError as error:
        raise ValueError(f"{path} is neither a benchmark document nor pytest-benchmark's JSON: {error}") from None
    facts = {name: str(document["environment"][name]) for name in FACTS if name in document["environment"]}
    if "gpu" in facts:
        facts["gpu"] = document["environment"]["gpu"]["name"]
    skipped = [row for row in document["rows"] if row.get("skipped", "").startswith(BROKEN)]
    broken = {tuple(row[name] for name in schema.IDENTITY): row["skipped"] for row in skipped}
    return Run(_of_document(document["rows"]), broken, facts)


def compare(old: dict[Key, Score], now: dict[Key, Score], threshold: float) -> tuple[list[Change], list[Key]]:
    """(changes, keys that could not be compared)."""
    changes, alone = [], list(old.keys() ^ now.keys())
    for key in old.keys() & now.keys():
        before, after = old[key], now[key]
        common = before.beside.keys() & after.beside.keys()
        names = sorted(common - {"limit"}) or sorted(common)
        if not names:
            alone.append(key)
            continue
        moved = [math.log(after.beside[n][0] / before.beside[n][0]) for n in names]
        machine = statistics.fmean(moved)  # how much slower the same work was in the new run
        ratio = math.exp(machine) * before.time / after.time
        uncertain = [before.uncertain, after.uncertain]
        uncertain += [score.beside[n][1] / math.sqrt(len(names)) for score in (before, after) for n in names]
        allowed = min(threshold + math.hypot(*uncertain), 0.9)
        by = "the limit measured beside it" if names == ["limit"] else ", ".join(names)
        changes.append(Change(key, ratio, allowed, by))
    return changes, alone


def _of_document(rows: Iterable[dict]) -> dict[Key, Score]:
    cases: dict[Key, list[dict]] = {}
    for row in rows:
        if "skipped" not in row:
            cases.setdefault(tuple(row[name] for name in ("op", "case", "direction", "dtype")), []).append(row)
    found = {}
    for key, members in cases.items():
        peers = {r["impl"]: (1 / r["rate"], notch(r["samples_ms"])) for r in members if not _ours(r)}
        for row in filter(_ours, members):
            limit = {"limit": (row["percent_of_limit"] / row["rate"], 0.0)} if row["percent_of_limit"] else {}
            found[*key, row["impl"]] = Score(1 / row["rate"], notch(row["samples_ms"]), peers | limit)
    return found


def _of_pytest(benchmarks: Iterable[dict]) -> dict[Key, Score]:
    found = {}
    for each in benchmarks:
        facts, stats = each.get("extra_info", {}), each.get("stats")
        if "calibration_ms" not in facts or not facts["impl"].startswith(PREFIX):
            continue
        key = tuple(facts[name] for name in schema.IDENTITY)
        data = stats.get("data") or []
        uncertain = notch(data) if data else 1.57 * stats["iqr"] / math.sqrt(stats["rounds"]) / stats["median"]
        beside = {"calibration": (statistics.median(facts["calibration_ms"]), notch(facts["calibration_ms"]))}
        found[key] = Score(1e3 * stats["median"], uncertain, beside)
    return found


def _ours(row: dict) -> bool:
    return row["impl"].startswith(PREFIX)

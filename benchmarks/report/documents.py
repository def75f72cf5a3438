"""Reads result files: documents of `benchmarks OP --json`, and the stages of `benchmarks gpu` that hold one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import schema
from benchmarks.harness import MAKES_MASK, PREFIX, makes_mask
from benchmarks.run import HOST_OPS


@dataclass(frozen=True)
class Document:
    """One run.  name: of its file, without the suffix; with folders if it is a stage, or another is called the same."""

    name: str
    environment: dict
    limits: dict
    rows: list[dict]

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.environment

    @property
    def grade(self) -> str:
        return "grade 3, run on a GPU" if self.on_gpu else "grade 1, run on a CPU"

    @property
    def device(self) -> str:
        return self.environment["gpu"]["name"] if self.on_gpu else self.environment["cpu"]

    @property
    def hardware(self) -> str:
        facts = self.environment
        if self.on_gpu:
            return f"{facts['gpu']['name']}, driver {facts['gpu'].get('driver_version', 'unknown')}"
        capability = f", {facts['cpu_capability']}" if "cpu_capability" in facts else ""
        return f"{facts['cpu']}{capability}, {facts['threads']} of {facts['cores']} cores"

    @property
    def versions(self) -> str:
        facts = self.environment
        return f"torch {facts['torch']}, Triton {facts['triton']}, Python {facts['python']}"

    @property
    def commit(self) -> str:
        return self.environment["commit"]

    def timed(self, op: str) -> list[dict]:
        return [row for row in self.rows if row["op"] == op and "skipped" not in row]

    def ops(self) -> list[str]:
        """Those with a figure, in the order of the rows."""
        return list(dict.fromkeys(row["op"] for row in self.rows if "skipped" not in row))


@dataclass(frozen=True)
class Case:
    """One case of one operator in one direction: our row (what `auto` takes), and the peers' rows, fastest first.

    A yardstick (a plain copy, a sort) is no peer: it does not solve the problem.
    """

    op: str
    case: str
    dtype: str
    direction: str
    ours: dict | None
    others: list[dict]  # our other implementations
    peers: list[dict]
    yardsticks: list[dict]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.dtype, self.direction

    @property
    def best(self) -> dict | None:
        """The fastest of those that keep their masks, as `ours` does."""
        return next((peer for peer in self.peers if not makes_mask(peer)), None)

    def like(self, peer: dict) -> dict | None:
        """Our row to measure a peer by: for who makes its mask in each call, ours that does so too, if it was timed."""
        if not makes_mask(peer):
            return self.ours
        return next((row for row in self.others if makes_mask(row)), None)

    def ratio(self, peer: dict) -> float | None:
        """How many times as fast as the peer ours is; by rate, as their calls need not hold equal work."""
        like = self.like(peer)
        return None if like is None else like["rate"] / peer["rate"]


def load(paths: Iterable[Path]) -> tuple[list[Document], list[str]]:
    """(documents, newest first, one for each device of a file; a line for each file left out, with the reason)."""
    found, left_out = [], []
    for path in {path.resolve(): path for path in paths}.values():  # each once
        try:
            content = json.loads(path.read_text())
            document = document_in(content)  # first: content may be a number
            found.append((path, "stage" in content, document))
        except OSError as error:
            left_out.append(f"{path.name}: {error.strerror}")
        except (json.JSONDecodeError, UnicodeDecodeError):
            left_out.append(f"{path.name}: no JSON")
        except ValueError as error:
            left_out.append(f"{path.name}: {error}")
    names = _names([(path, of_stage) for path, of_stage, _ in found])
    documents = []
    for name, (_, _, content) in zip(names, found, strict=True):
        rows = [_marked(row) for row in content["rows"]]
        documents += _by_device(Document(name, content["environment"], content["limits"], rows))
    return sorted(documents, key=lambda d: d.environment["date"], reverse=True), left_out


def _marked(row: dict) -> dict:
    """The row as it would be written today: who makes its mask anew had no mark in files before 2026-11-29."""
    if row["impl"] != "flex_with_mask" or "skipped" in row:
        return row
    return row | {"extra": row.get("extra", {}) | MAKES_MASK}


def _by_device(document: Document) -> list[Document]:
    """What `all` measured on the host of a GPU machine is the host's, not the GPU's: the planner, reading data."""
    host = [row for row in document.rows if row["op"] in HOST_OPS]
    if not host or not document.on_gpu:
        return [document]
    facts = {name: fact for name, fact in document.environment.items() if name != "gpu"} | {"device": "cpu"}
    rest = [row for row in document.rows if row["op"] not in HOST_OPS]
    return [*([replace(document, rows=rest)] if rest else []), Document(f"{document.name}-host", facts, {}, host)]


def cases(rows: list[dict]) -> list[Case]:
    """In the order of the rows; directions of one case together.  rows: timed ones."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["dtype"], row["direction"]), []).append(row)
    found = []
    for key, members in groups.items():
        own = [row for row in members if row["impl"].startswith(PREFIX)]
        # stable: the first is the fastest meant
        own.sort(key=lambda row: (makes_mask(row), not row.get("extra", {}).get("auto", False)))
        rest = [row for row in members if not row["impl"].startswith(PREFIX)]
        rest.sort(key=lambda row: -row["rate"])
        yardsticks = [row for row in rest if row.get("extra", {}).get("yardstick", False)]
        peers = [row for row in rest if row not in yardsticks]
        found.append(Case(*key, own[0] if own else None, own[1:], peers, yardsticks))
    order = {name: i for i, name in enumerate(dict.fromkeys((c.op, c.case, c.dtype) for c in found))}
    return sorted(found, key=lambda c: (order[c.op, c.case, c.dtype], schema.DIRECTIONS.index(c.direction)))


def _names(files: list[tuple[Path, bool]]) -> list[str]:
    """For each (path, whether a stage of `gpu` wrote it) a name that no other has: plots and headings are called by it.

    A stage's is always named by its folder too: each GPU has one, and another's must not rename these plots.
    """
    parts = [path.resolve().with_suffix("").parts for path, _ in files]
    depths = [2 if of_stage else 1 for _, of_stage in files]
    names = []
    for _ in range(max(map(len, parts), default=0)):
        names = ["-".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        depths = [depth + (names.count(name) > 1) for name, depth in zip(names, depths, strict=True)]
    return names


def document_in(content: Any) -> dict:
    """The run that a file's JSON is, or that a stage holds.  Raises ValueError with the reason where there is none."""
    if isinstance(content, dict) and "stage" in content:
        if content.get("dry_run"):
            raise ValueError("a dry run, none of whose figures counts")
        if not content.get("ok") and not content.get("cut_off"):  # the rows before a cut are as good as any
            raise ValueError(f"stage {content['stage']} is not ok")
        content = content.get("result")
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError("no benchmark document: it has no rows")
    wrong = schema.errors(content)
    if wrong:
        raise ValueError(f"malformed: {wrong[0]}")
    return content

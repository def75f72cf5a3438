"""The GPU part of docs/evidence.md, from the stage files of `python -m benchmarks gpu`: figures, and what is not ok."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.stages import STAGES
from benchmarks.report import documents, tables

NONE = "There is no result of a GPU: none of these kernels has been shown to run on one, and no speed is claimed."


def render(paths: Iterable[Path]) -> str:
    """Markdown.  Dry runs are no evidence and are left out."""
    records = stage_records(paths)
    if not records:
        return NONE
    rows = []
    for record in records:
        facts = record["environment"]
        of = facts["commit"] if facts["commit"] != "unknown" else f"sources {facts.get('sources', 'unknown')}"
        rows.append((record["stage"], outcome(record), _gpu(record), of, facts["date"][:10]))
    lines = [*tables.markdown_table(("stage", "result", "hardware", "commit", "date"), rows), "", *_failures(records)]
    timed, _ = documents.load([path for path in paths if path.stem in STAGES])
    shown = [document for document in timed if document.on_gpu]
    if shown:
        lines += ["", tables.summary(shown)]
    return "\n".join(lines)


def stage_records(paths: Iterable[Path]) -> list[dict]:
    """By GPU, then in the order of the stages.  Only of runs on a GPU."""
    found = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if not isinstance(record, dict) or record.get("stage") not in STAGES:
            continue
        if "gpu" in record.get("environment", {}) and not record.get("dry_run"):
            found.append(record)
    return sorted(found, key=lambda record: (_gpu(record), list(STAGES).index(record["stage"])))


def _gpu(record: dict) -> str:
    return record["environment"]["gpu"]["name"]


def gpus_in(text: str) -> set[str]:
    """Whose results a text has that `render` wrote."""
    rows = ([cell.strip() for cell in line.split("|")] for line in text.splitlines())
    return {row[3] for row in rows if len(row) > 3 and row[1] in STAGES}


def outcome(record: dict) -> str:
    """One line: what a stage showed, or why it showed nothing."""
    if "error" in record and not record.get("cut_off"):
        return f"failed: {record['error'].strip().splitlines()[-1]}"
    result = record["result"]
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    if "passed" in result:
        left = f", {len(result['not_run'])} not run for lack of time" if result["not_run"] else ""
        return f"{result['passed']} checks passed, {result['failed']} failed{left}"
    if "rows" in result:
        timed = sum("skipped" not in row for row in result["rows"])
        wrong = sum(row.get("skipped", "").startswith("wrong") for row in result["rows"])
        cut = ", then cut off" if record.get("cut_off") else ""
        return f"{timed} rows timed, {len(result['rows']) - timed} skipped, of these {wrong} for a wrong result{cut}"
    if "limits" in result:
        return ", ".join(f"{name} {x['value']:.3g} {x['unit']}" for name, x in result["limits"].items())
    if "entries" in result:
        return f"{len(result['entries'])} configurations faster than the default"
    return "done" if record["ok"] else "not ok"


def _failures(records: list[dict]) -> list[str]:
    lines = []
    for record in records:
        failed = [check for check in record.get("result", {}).get("checks", ()) if not check["ok"]]
        lines += [f"- FAILED {check['name']}: {check['message']}".replace("\n", " ") for check in failed]
    return lines

"""The JSON that a benchmark run writes, and the check that it is well formed.

    {"environment": {...}, "limits": {name: {"value", "unit", "after"}}, "rows": [row, ...]}, perhaps with "profile"

A limit's "after" is what it was when the run ended; a run that was cut off has none.
A timed row has IDENTITY, FIGURES (samples_ms: the raw times) and "checked": true, and perhaps "extra", facts of the op.
A skipped row has IDENTITY and "skipped": the reason, and no figure at all.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

IDENTITY = ("op", "case", "direction", "dtype", "impl")
FIGURES = ("median_ms", "spread", "rate", "rate_unit", "percent_of_limit", "speedup_over", "samples_ms")
OPTIONAL = ("extra",)
DIRECTIONS = ("fwd", "bwd", "fwd+bwd", "step")
KINDS = {"environment": dict, "limits": dict, "rows": list}
ENVIRONMENT = ("date", "device", "cpu", "cores", "threads", "python", "torch", "triton", "numpy", "commit", "seed")


def errors(document: Any) -> list[str]:
    """What is wrong with document; empty when it is well formed."""
    if not isinstance(document, dict) or set(document) - {"profile"} != {"environment", "limits", "rows"}:
        return ["document: expected exactly environment, limits, rows"]
    for name, kind in KINDS.items():
        if not isinstance(document[name], kind):
            return [f"{name}: expected a {kind.__name__}, got {str(document[name])[:40]}"]
    found = [f"environment: lacks {key}" for key in ENVIRONMENT if key not in document["environment"]]
    for name, limit in document["limits"].items():
        known = isinstance(limit, dict) and set(limit) - {"after"} == {"value", "unit"}
        if not known or not all(_positive(limit[key]) for key in limit if key != "unit"):
            found.append(f"limits.{name}: expected a positive value and a unit, perhaps one after, got {limit}")
    for index, row in enumerate(document["rows"]):
        found += [f"rows[{index}]: {problem}" for problem in _row_errors(row)]
    return found


def _row_errors(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return [f"expected a dict, got {str(row)[:40]}"]
    found = [f"{key} is {row.get(key)!r}, expected a name" for key in IDENTITY if not _name(row.get(key))]
    if row.get("direction") not in DIRECTIONS:
        found.append(f"direction is {row.get('direction')!r}, expected one of {DIRECTIONS}")
    if "skipped" in row:
        extra = set(row) - set(IDENTITY) - {"skipped"}
        if extra:
            found.append(f"skipped, yet has {sorted(extra)}")
        if not _name(row["skipped"]):
            found.append("skipped without a reason")
        return found
    unknown = set(row) - {*IDENTITY, *FIGURES, *OPTIONAL, "checked"}
    missing = {*IDENTITY, *FIGURES, "checked"} - set(row)
    if unknown or missing:
        return [*found, f"unknown keys {sorted(unknown)}, missing keys {sorted(missing)}"]
    if row["checked"] is not True:
        found.append("timed without having been checked")
    if not _positive(row["median_ms"]) or not _positive(row["rate"]):
        found.append(f"median_ms {row['median_ms']!r} and rate {row['rate']!r} must be positive")
    if not isinstance(row["spread"], Real) or not row["spread"] >= 0:
        found.append(f"spread is {row['spread']!r}, expected a number >= 0")
    if (
        not isinstance(row["samples_ms"], list)
        or not row["samples_ms"]
        or not all(_positive(ms) for ms in row["samples_ms"])
    ):
        found.append("samples_ms must hold the positive times that the median is of")
    if row["percent_of_limit"] is not None and not _positive(row["percent_of_limit"]):
        found.append(f"percent_of_limit is {row['percent_of_limit']!r}, expected null or positive")
    ratios = row["speedup_over"]
    if not isinstance(ratios, dict) or not all(_name(peer) and _positive(x) for peer, x in ratios.items()):
        found.append(f"speedup_over is {ratios!r}, expected {{peer: ratio > 0}}")
    return found


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and value > 0

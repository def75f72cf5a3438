"""Rows of a table that a user has: csv, tsv, jsonl or parquet, by the suffix of its name."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from mmmodel.configs import ConfigError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
ROWS = 1000  # of a parquet file, read at a time


def read(path: Path, as_they_are: Container[str]) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """Names of the columns, and rows as objects.  Raises ConfigError for what does not read.

    as_they_are: columns of text, which in csv would be a number where it looks like one.
    """
    import pyarrow

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            file = parquet.ParquetFile(path)
            batches = (batch.to_pylist() for batch in file.iter_batches(ROWS))
            return file.schema_arrow.names, itertools.chain.from_iterable(batches)
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _lines(file) if suffix == ".jsonl" else _cells(file, "\t" if suffix == ".tsv" else ",", as_they_are)
    except (ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise ConfigError(f"convert: {path} does not read as {suffix[1:]}: {error}") from error
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _lines(file: Iterable[str]) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file if line.strip()]
    if wrong := next((row for row in rows if not isinstance(row, dict)), None):
        raise ValueError(f"a line holds {wrong!r}, expected an object")
    return rows


def _cells(file: Iterable[str], delimiter: str, as_they_are: Container[str]) -> list[dict[str, Any]]:
    """A column that holds numbers alone gives numbers, which a regression can learn, and one of JSON lists gives lists,
    which are labels; 007 is neither."""
    rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number + 1} has more or fewer cells than there are columns")
    for name in rows[0] if rows else ():
        values = [_number_or_list(row[name]) for row in rows if row[name]]
        if name not in as_they_are and None not in values:
            there = iter(values)
            for row in rows:
                row[name] = next(there) if row[name] else None
    return rows


def _number_or_list(cell: str) -> float | list | None:
    try:
        value = json.loads(cell)
    except ValueError:
        return None
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if finite or isinstance(value, list) else None

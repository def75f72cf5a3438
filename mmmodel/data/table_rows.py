"""Rows of a table that a user has: csv, tsv, jsonl or parquet, by the suffix of its name."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mmmodel.configs import ConfigError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
ROWS = 1000  # of a parquet file, read at a time
LARGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072

Row = dict[str, Any]


def read(path: Path, as_they_are: Container[str]) -> tuple[list[str], Iterable[Row]]:
    """Names of the columns, and rows as objects.  Raises ConfigError for what does not read, also with a later row.

    as_they_are: columns of text, which in csv would be a number where it looks like one.
    """
    try:
        if path.suffix.lower() == ".parquet":
            return _parquet(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                return _lines(file)
            return _cells(file, "\t" if path.suffix.lower() == ".tsv" else ",", as_they_are)
    except (ValueError, csv.Error, RecursionError) as error:
        raise _unread(path, error) from error


def _unread(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"convert: {path} does not read as {path.suffix[1:].lower()}: {error}")


def _parquet(path: Path) -> tuple[list[str], Iterator[Row]]:
    import pyarrow
    from pyarrow import parquet

    def rows() -> Iterator[Row]:
        try:
            for batch in file.iter_batches(ROWS):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise _unread(path, error) from error

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise _unread(path, error) from error
    return _once_each(file.schema_arrow.names), rows()


def _lines(file: TextIO) -> tuple[list[str], list[Row]]:
    rows = [json.loads(line) for line in file if line.strip()]
    if wrong := next((row for row in rows if not isinstance(row, dict)), None):
        raise ValueError(f"a line holds {wrong!r}, expected an object")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _cells(file: TextIO, delimiter: str, as_they_are: Container[str]) -> tuple[list[str], list[Row]]:
    """A column that holds numbers alone gives numbers, which a regression can learn, and one of JSON lists gives lists,
    which are labels; 007 is neither."""
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        names, rows = _once_each(reader.fieldnames or []), list(reader)
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number + 1} has more or fewer cells than there are columns")
    for name in names:
        values = [_number_or_list(row[name]) for row in rows if row[name]]
        if name not in as_they_are and None not in values:
            there = iter(values)
            for row in rows:
                row[name] = next(there) if row[name] else None
    return names, rows


def _once_each(names: list[str]) -> list[str]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"it has the column {twice[0]} twice")
    return list(names)


def _number_or_list(cell: str) -> float | list | None:
    try:
        value = json.loads(cell)
    except ValueError:
        return None
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if finite or isinstance(value, list) else None

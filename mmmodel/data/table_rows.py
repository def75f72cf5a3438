"""Rows of a table that a user has: csv, tsv, jsonl or parquet, by the suffix of its name."""

from __future__ import annotations

import csv
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, TextIO

from mmmodel.configs import ConfigError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
ROWS = 1000  # of a parquet file, read at a time
LARGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072

Row = dict[str, Any]


class NotUTF8(str):
    """In a row's place: what of it is not UTF-8."""


def read(path: Path, as_they_are: Container[str]) -> tuple[list[str], Iterator[Row | NotUTF8]]:
    """Names of the columns, and rows as objects, a few in memory at a time.

    Raises ConfigError for what does not read, also with a later row.  All but parquet is read twice, since names and
    kinds of columns depend on all rows.  as_they_are: columns of text, which in csv would be a number where it looks
    like one.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".jsonl":
        names = dict.fromkeys(name for row in _lines(path) if isinstance(row, dict) for name in row)
        return list(names), _lines(path)
    return _table(path, "\t" if suffix == ".tsv" else ",", as_they_are)


def _unread(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"convert: {path} does not read as {path.suffix[1:].lower()}: {error}")


def _told(rows: Callable[..., Iterator]) -> Callable[..., Iterator]:
    @functools.wraps(rows)
    def telling(path: Path, *arguments) -> Iterator:
        try:
            yield from rows(path, *arguments)
        except (ValueError, csv.Error, RecursionError) as error:
            raise _unread(path, error) from error

    return telling


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
        return _once_each(file.schema_arrow.names), rows()
    except (pyarrow.ArrowException, ValueError) as error:
        raise _unread(path, error) from error


@_told
def _lines(path: Path) -> Iterator[Row | NotUTF8]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if wrong := _not_utf8(line):
                yield wrong
            elif line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a line holds {row!r}, expected an object")
                yield row


def _table(path: Path, delimiter: str, as_they_are: Container[str]) -> tuple[list[str], Iterator[Row | NotUTF8]]:
    """A column that holds numbers alone gives numbers, which a regression can learn, and one of JSON lists gives lists,
    which are labels; 007 is neither."""
    cells = _cells(path, delimiter)
    names = next(cells, [])
    values = [name not in as_they_are for name in names]
    for row in cells:
        if not isinstance(row, NotUTF8):
            values = [
                value and (not cell or _number_or_list(cell) is not None)
                for value, cell in zip(values, row, strict=True)
            ]

    def rows() -> Iterator[Row | NotUTF8]:
        again = _cells(path, delimiter)
        next(again, None)
        for row in again:
            if isinstance(row, NotUTF8):
                yield row
            else:
                read = [_number_or_list(cell) if value else cell for value, cell in zip(values, row, strict=True)]
                yield dict(zip(names, read, strict=True))

    return names, rows()


@_told
def _cells(path: Path, delimiter: str) -> Iterator[list[str] | NotUTF8]:
    """The names of the columns first."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _read_by_csv(file, delimiter)
        names = _once_each(next(rows, []))
        if wrong := _not_utf8(delimiter.join(names)):
            raise ValueError(f"the names of its columns: {wrong}")
        yield names
        for number, row in enumerate(rows):
            if len(row) != len(names):
                raise ValueError(f"row {number + 1} has more or fewer cells than there are columns")
            yield _not_utf8(delimiter.join(row)) or row


def _read_by_csv(file: TextIO, delimiter: str) -> Iterator[list[str]]:
    """All but blank lines.  csv's limit is the whole process's: it is raised while a row is read, not in between."""
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    row = []
    while row is not None:
        if row:
            yield row
        limit = csv.field_size_limit(LARGEST_CELL)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(limit)


def _not_utf8(text: str) -> NotUTF8 | None:
    """text: decoded with surrogateescape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        return NotUTF8(f"not UTF-8: byte 0x{ord(text[error.start]) - 0xDC00:02x} after {before!r}")
    return None


def _once_each(names: list[str]) -> list[str]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"it has the column {twice[0]} twice")
    return list(names)


def _number_or_list(cell: str) -> float | list | None:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return value if number or isinstance(value, list) else None

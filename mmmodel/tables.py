"""Tables of results, written as they are made: parquet, csv or jsonl, by the suffix of the file's name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmmodel import atomic
from mmmodel.configs import ConfigError

Columns = Mapping[str, str]  # name -> kind: text, number, vector (of float32), names (a list of text)
Rows = Sequence[Sequence[Any]]  # one value per column
Append = Callable[[Rows], None]


def check(path: Path) -> None:
    """Raises ConfigError for a suffix that is no format and for a folder; to be asked before the work is done."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: its suffix is {path.suffix!r}, expected {', '.join(FORMATS)}, which is the format")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, expected the name of a file to write")


def write(path: Path, columns: Columns, chunks: Iterable[Rows], about: Mapping[str, str] | None = None) -> int:
    """Write chunks of rows under `path` and return their number; the file appears whole or not at all.

    about: what a parquet file says of itself; the other formats have no place for it.  In csv a list is one cell, as
    JSON; in jsonl a row is an object.  Raises ConfigError as `check` does.
    """
    check(path)
    count = 0
    with (
        atomic.replacing(path) as partial,
        FORMATS[path.suffix](partial, columns, about or {}) as append,
    ):
        for rows in chunks:
            append(rows)
            count += len(rows)
    return count


@contextmanager
def _parquet(path: Path, columns: Columns, about: Mapping[str, str]) -> Iterator[Append]:
    import pyarrow
    from pyarrow import parquet

    kinds = {
        "text": pyarrow.string(),
        "number": pyarrow.float64(),
        "vector": pyarrow.list_(pyarrow.float32()),
        "names": pyarrow.list_(pyarrow.string()),
    }
    schema = pyarrow.schema({name: kinds[kind] for name, kind in columns.items()}, metadata=dict(about))
    with parquet.ParquetWriter(path, schema) as writer:

        def append(rows: Rows) -> None:
            lists = zip(*rows, strict=True) if rows else [[] for _ in columns]
            writer.write_table(pyarrow.table([pyarrow.array(v, f.type) for v, f in zip(lists, schema, strict=True)],
                                             schema=schema))  # fmt: skip

        yield append


@contextmanager
def _csv(path: Path, columns: Columns, about: Mapping[str, str]) -> Iterator[Append]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)

        def append(rows: Rows) -> None:
            for row in rows:
                cells = [_plain(value) for value in row]
                writer.writerow([_json(cell) if isinstance(cell, list) else cell for cell in cells])

        yield append


@contextmanager
def _jsonl(path: Path, columns: Columns, about: Mapping[str, str]) -> Iterator[Append]:
    with path.open("w", encoding="utf-8") as file:

        def append(rows: Rows) -> None:
            file.writelines(_json(dict(zip(columns, map(_plain, row), strict=True))) + "\n" for row in rows)

        yield append


FORMATS = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """As JSON has it.  A float32 keeps its own digits, 0.1 and not 0.10000000149."""
    if isinstance(value, np.ndarray):
        return [_plain(number) for number in value]
    if isinstance(value, tuple):
        return list(value)
    return float(str(value)) if isinstance(value, np.floating) else value

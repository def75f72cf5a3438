"""Features in memory: what each front end prepared from raw samples, once, kept in the cache folder.

The samples of one image in many languages share its features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from safetensors.numpy import load_file, save_file

from mmmodel.data.loader import BrokenSampleError, ShardDataset

logger = logging.getLogger(__name__)

READERS = {"text": "read_text", "image": "read_image", "audio": "read_waveform"}
MEMBERS = {"text": ("txt",), "image": ("png", "jpg", "jpeg", "webp"), "audio": ("flac", "ogg", "wav")}
CACHED = ("image", "audio")  # text is cheaper to tokenise than to look up
MAX_BROKEN_IN_A_ROW = 10


@dataclass(frozen=True)
class Item:
    """One sample: what it is about, and where its features lie."""

    key: str
    group: str  # samples of a group show the same thing: one image in many languages
    language: str
    concept: str
    split: str
    rows: dict[str, int]  # modality -> number of its feature array; a missing modality is absent


class Features:
    """Per modality a list of arrays, stored as one flat array: few objects, one file."""

    def __init__(self, flat: dict[str, np.ndarray], shapes: dict[str, np.ndarray]) -> None:
        self.flat, self.shapes = flat, shapes
        self.ends = {name: np.cumsum(shape.prod(axis=1)) for name, shape in shapes.items()}

    @classmethod
    def of(cls, arrays: dict[str, Sequence[np.ndarray]]) -> Features:
        present = {name: group for name, group in arrays.items() if len(group)}
        flat = {name: np.concatenate([array.reshape(-1) for array in group]) for name, group in present.items()}
        return cls(
            flat, {name: np.array([array.shape for array in group], np.int64) for name, group in present.items()}
        )

    def get(self, name: str, row: int) -> np.ndarray:
        shape = self.shapes[name][row]
        end = self.ends[name][row]
        return self.flat[name][end - shape.prod() : end].reshape(shape)


def read_captions(dataset: ShardDataset, split: str) -> list[str]:
    """All captions of a split, for training the tokenizer."""
    rows = [i for i, entry in enumerate(dataset.entries) if entry.meta.get("split") == split]
    return [text for i in rows if (text := dataset.read_text(i))]


def prepare(dataset: ShardDataset, front_ends, cache: Path, *, threads: int) -> tuple[list[Item], Features]:
    """Every sample of the dataset as features.  Images and audio are read from, or written to, a file in `cache`.

    A member that does not decode is logged and its sample goes without that modality.
    """
    tables = {name: _Table(dataset, name) for name in front_ends}
    arrays, missing = {}, {}
    for name, front_end in front_ends.items():
        table = tables[name]
        path = cache / "features" / f"{name}-{_fingerprint(dataset, front_end, table)}.safetensors"
        if name in CACHED and path.exists():
            stored = load_file(path)
            arrays[name], missing[name] = (stored["flat"], stored["shapes"]), set(stored["missing"].tolist())
            continue
        made, missing[name] = _prepare_all(table, front_end, threads)
        part = Features.of({name: made})
        arrays[name] = (part.flat.get(name), part.shapes.get(name))
        if name in CACHED and made:
            lost = np.array(sorted(missing[name]), np.int64)
            _save(path, {"flat": part.flat[name], "shapes": part.shapes[name], "missing": lost})
    features = Features(
        {name: flat for name, (flat, _) in arrays.items() if flat is not None},
        {name: shapes for name, (_, shapes) in arrays.items() if shapes is not None},
    )
    return _items(dataset, tables, missing), features


class _Table:
    """The distinct members of one modality: which sample each is read from, and which row each sample has."""

    def __init__(self, dataset: ShardDataset, name: str) -> None:
        self.dataset, self.name = dataset, name
        self.sources: list[int] = []
        self.row_of: dict[int, int] = {}
        seen: dict[str, int] = {}
        for i, entry in enumerate(dataset.entries):
            if entry.member(MEMBERS[name]) is None:
                continue
            key = _group(entry) if name == "image" else entry.key
            if key not in seen:
                seen[key] = len(self.sources)
                self.sources.append(i)
            self.row_of[i] = seen[key]

    def read(self, row: int):
        return getattr(self.dataset, READERS[self.name])(self.sources[row])


def _group(entry) -> str:
    return entry.meta.get("image", entry.key)


def _prepare_all(table: _Table, front_end, threads: int) -> tuple[list[np.ndarray], set[int]]:
    """Feature arrays in row order, and the rows that did not decode (they hold an empty array of the right rank)."""

    def one(row: int) -> np.ndarray | BrokenSampleError:
        try:
            return front_end.prepare(table.read(row))
        except BrokenSampleError as error:
            return error
        except Exception as error:  # it decodes to something that no features can be made of, such as NaN
            key = table.dataset.entries[table.sources[row]].key
            return BrokenSampleError(f"{key}: {table.name}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(threads) as pool:  # decoders and transforms release the GIL
        rows = range(len(table.sources))
        results = list(
            track(pool.map(one, rows), total=len(rows), description=f"features: {table.name}", disable=len(rows) < 500)
        )
    missing, in_a_row = set(), 0
    for row, result in enumerate(results):
        in_a_row = in_a_row + 1 if isinstance(result, BrokenSampleError) else 0
        if in_a_row:
            logger.warning("left out: %s", result)
            missing.add(row)
        if in_a_row > MAX_BROKEN_IN_A_ROW:
            raise RuntimeError(
                f"features: more than {MAX_BROKEN_IN_A_ROW} samples in a row do not decode; the last: {result}"
            )
    good = next((result for row, result in enumerate(results) if row not in missing), None)
    if good is None:
        return [], missing
    empty = np.zeros((0,) * good.ndim, good.dtype)
    return [empty if row in missing else result for row, result in enumerate(results)], missing


def _items(dataset: ShardDataset, tables: dict[str, _Table], missing: dict[str, set[int]]) -> list[Item]:
    items = []
    for i, entry in enumerate(dataset.entries):
        rows = {name: table.row_of[i] for name, table in tables.items() if i in table.row_of}
        rows = {name: row for name, row in rows.items() if row not in missing[name]}
        if rows:
            meta = entry.meta
            language, split = str(meta.get("lang", "")), str(meta.get("split", "train"))
            items.append(Item(entry.key, _group(entry), language, str(meta.get("concept", entry.key)), split, rows))
    return items


def _fingerprint(dataset: ShardDataset, front_end, table: _Table) -> str:
    """Changes with the data, the selection of samples, and how the front end prepares them."""
    about = {
        "recipe": getattr(front_end, "recipe", ""),
        "members": [
            (dataset.entries[i].key, dataset.entries[i].shard, *dataset.entries[i].member(MEMBERS[table.name]))
            for i in table.sources
        ],
        "folder": str(dataset.path.resolve()),
        "written": max(path.stat().st_mtime_ns for path in dataset.path.glob("*.tar")),
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Atomically: another run may be looking for the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(arrays, partial)
    partial.replace(path)

"""Features of a data set: what each front end prepared from raw samples, once, kept in the cache folder.

The samples of one image in many languages share its features.  Images and sound are written to their file as they are
made and read through a memory map: a data set larger than memory is paged in by the batches that ask for it, in any
order, and the system forgets what it needs room for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmmodel import distributed, settings
from mmmodel.configs import ConfigError
from mmmodel.data import summary
from mmmodel.data.array_file import ArrayWriter
from mmmodel.data.loader import MAX_BROKEN_IN_A_ROW, BrokenSampleError, ShardDataset, in_words
from mmmodel.data.shards import shard_stamps
from mmmodel.limits import listed

logger = logging.getLogger(__name__)


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


def read_captions(dataset: ShardDataset, split: str) -> list[tuple[str, str]]:
    """Concept and caption of each sample of a split that has one: for the tokenizer, and what learns from words.

    A caption that does not decode is passed over: it is `prepare` that says so.
    """
    found = []
    for i, entry in enumerate(dataset.entries):
        with suppress(BrokenSampleError):
            if entry.split == split and (text := dataset.read_text(i)):
                found.append((entry.concept, text))
    return found


def prepare(
    dataset: ShardDataset, front_ends, cache: Path | str | None = None, *, threads: int = 1
) -> tuple[list[Item], Features]:
    """Every sample of the dataset as features.  Images and audio are mapped from files in `cache`, made if missing.

    cache: by default that of the settings.  threads: that decode, two at the least.
    A member that does not decode is logged and its sample goes without that modality, as it does with a blank caption.
    Raises ConfigError if many in a row do not decode, or if the cache cannot be written.
    """
    tables = {name: _Table(dataset, name, front_end) for name, front_end in front_ends.items()}
    cache = Path(cache) if cache else settings.current().cache
    threads = max(2, threads)  # decoders wait for disks and release the GIL, even where one thread computes
    flat, shapes, missing = {}, {}, {}
    for name, table in tables.items():
        if not hasattr(table.front_end, "recipe") or not table.sources:  # text is cheaper to tokenise than to look up
            missing[name] = set()
            part = Features.of({name: _filled(list(_prepare_all(table, threads, missing[name])))})
            flat |= part.flat
            shapes |= part.shapes
            continue
        path = cache / "features" / f"{name}-{_fingerprint(table)}.safetensors"
        stored = _stored(path, table, threads)
        missing[name] = set(stored["missing"].tolist())
        flat[name], shapes[name] = stored["flat"], stored["shapes"]
    read = {name: {i for i, row in table.row_of.items() if row not in missing[name]} for name, table in tables.items()}
    if not distributed.rank():
        _tell(dataset, tables, read, shapes)
    return _items(dataset, tables, read), Features(flat, shapes)


class _Table:
    """The distinct members of one modality: which sample each is read from, and which row each sample has."""

    def __init__(self, dataset: ShardDataset, name: str, front_end) -> None:
        self.dataset, self.name, self.front_end = dataset, name, front_end
        self.sources: list[int] = []
        self.row_of: dict[int, int] = {}
        self.unlike: list[str] = []  # keys of samples whose own picture is not that of their group
        seen: dict[str, int] = {}
        for i, entry in enumerate(dataset.entries):
            if (member := entry.member(front_end.members)) is None:
                continue
            key = entry.group if name == "image" else entry.key
            if key not in seen:
                seen[key] = len(self.sources)
                self.sources.append(i)
            elif member[1] != dataset.entries[self.sources[seen[key]]].member(front_end.members)[1]:
                self.unlike.append(entry.key)
            self.row_of[i] = seen[key]

    def read(self, row: int):
        return self.dataset.read(self.sources[row], self.front_end.members, self.front_end.decode)


def _stored(path: Path, table: _Table, threads: int) -> dict[str, np.ndarray]:
    """Memory maps of what `_write` wrote to path: now, if there is no such file, or one whose head is damaged."""
    if path.exists():
        with suppress(SafetensorError, KeyError):
            return _mapped(path)
        logger.warning("%s: damaged, its features are made anew", path)
    _write(path, table, threads)
    return _mapped(path)


def _mapped(path: Path) -> dict[str, np.ndarray]:
    tensors = load_file(path)
    return {name: tensors[name].numpy() for name in ("flat", "shapes", "missing")}


def _write(path: Path, table: _Table, threads: int) -> None:
    missing: set[int] = set()
    try:
        with ArrayWriter(path) as writer:
            for feature in _prepare_all(table, threads, missing):
                writer.add(feature)
            writer.finish({"missing": np.array(sorted(missing), np.int64)})
    except OSError as error:  # writing: what does not read is a broken sample
        raise ConfigError(f"features: {error.strerror}: {path} (MMMODEL_CACHE names the folder)") from error


def _tell(
    dataset: ShardDataset, tables: dict[str, _Table], read: dict[str, set[int]], shapes: dict[str, np.ndarray]
) -> None:
    """Log what was read, what was left out, and what is as long as its front end lets it be."""
    full = {}
    for name, table in tables.items():
        if read[name] and (longest := getattr(table.front_end, "longest", None)):
            lengths = shapes[name][[table.row_of[i] for i in read[name]], 0]
            full[name] = int((lengths >= longest[0]).sum()), longest[1]
    members = {name: table.front_end.members for name, table in tables.items()}
    for line in summary.lines(dataset, members, read, full):
        logger.info("%s: %s", dataset.path, line)
    for table in tables.values():
        if table.unlike:
            words = "%s: %d samples name another's `image` but hold a file of another size; the first's is read: %s"
            logger.warning(words, dataset.path, len(table.unlike), listed(table.unlike))


def _prepare_all(table: _Table, threads: int, missing: set[int]) -> Iterator[np.ndarray | None]:
    """Features in row order; None for what does not decode or is blank, whose row is added to `missing`."""

    def one(row: int) -> np.ndarray | BrokenSampleError | None:
        try:
            raw = table.read(row)
            return None if raw is None else table.front_end.prepare(raw)
        except BrokenSampleError as error:
            return error
        except Exception as error:  # it decodes to something that no features can be made of
            entry = table.dataset.entries[table.sources[row]]
            return BrokenSampleError(f"{entry.shard}: {entry.key}: {table.name}: {in_words(error)}")

    rows = range(len(table.sources))
    in_a_row = 0
    with ThreadPoolExecutor(threads) as pool:  # decoders and transforms release the GIL
        results = _in_order(pool, one, rows, ahead=8 * threads)
        shown = track(results, total=len(rows), description=f"features: {table.name}", disable=len(rows) < 500)
        for row, result in enumerate(shown):
            broken = isinstance(result, BrokenSampleError)
            in_a_row = in_a_row + 1 if broken else 0
            if broken:
                logger.warning("left out: %s", result)
            if broken or result is None:
                missing.add(row)
            if in_a_row > MAX_BROKEN_IN_A_ROW:
                raise ConfigError(
                    f"features: more than {MAX_BROKEN_IN_A_ROW} samples in a row do not decode; the last: {result}"
                )
            yield None if broken else result


def _filled(made: list[np.ndarray | None]) -> list[np.ndarray]:
    """With an empty array of the right rank in place of each None; [] where there is nothing else."""
    good = next((feature for feature in made if feature is not None), None)
    if good is None:
        return []
    return [np.zeros((0,) * good.ndim, good.dtype) if feature is None else feature for feature in made]


def _in_order(pool: ThreadPoolExecutor, function: Callable, rows: Iterable[int], *, ahead: int) -> Iterator[Any]:
    """function(row) for each row, at most `ahead` of them done or under way before they are asked for."""
    waiting: deque[Future] = deque()
    for row in rows:
        waiting.append(pool.submit(function, row))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _items(dataset: ShardDataset, tables: dict[str, _Table], read: dict[str, set[int]]) -> list[Item]:
    items = []
    for i, entry in enumerate(dataset.entries):
        if rows := {name: table.row_of[i] for name, table in tables.items() if i in read[name]}:
            items.append(Item(entry.key, entry.group, entry.language, entry.concept, entry.split, rows))
    return items


def _fingerprint(table: _Table) -> str:
    """Changes with the data, the selection of samples, and how the front end prepares them."""
    folder, stamps = table.dataset.path, shard_stamps(table.dataset.path)
    entries = [table.dataset.entries[i] for i in table.sources]
    about = {
        "recipe": table.front_end.recipe,
        "members": [(entry.key, entry.shard, *entry.member(table.front_end.members)) for entry in entries],
        "folder": str(folder.resolve()),
        "shards": {name: stamps[name] for name in sorted({entry.shard for entry in entries})},
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

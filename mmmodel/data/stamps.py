"""Prepare the Tux Paint stamps: one sample per (image, language) as tar shards per split, in a cache folder.

`prepare()` is idempotent and atomic: a folder with a matching manifest.json is complete, and a broken run leaves
nothing but a temporary folder that the next run removes.
"""

import hashlib
import json
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmodel import atomic, settings
from mmmodel.configs import ConfigError
from mmmodel.data import media, tuxpaint
from mmmodel.data.concepts import CONCEPT_LANGUAGES, SPLITS, assign_concepts, split_of
from mmmodel.data.shards import Entry, read_index, write_index, write_shard

logger = logging.getLogger(__name__)

RECIPE = 1  # raise it when the same package would give different samples
MAX_AREA = 512 * 512
IMAGES_PER_SHARD = 32  # about 15 MB with ten languages; 31 shards to spread over ranks and processes
MANIFEST = "manifest.json"
LICENCE = "GPL-2, (c) 2002-2022 Bill Kendrick and contributors; from Debian's tuxpaint-stamps-default"

# Of package version 2022.06.04-1.  Every published number rests on this split.
EXPECTED = {"images": 950, "concepts": 729, "test images": 219, "validation images": 90, "train images": 641}


@dataclass(frozen=True)
class _Task:
    shard: Path
    split: str
    stamps: list[tuxpaint.Stamp]
    concepts: dict[str, str]
    languages: tuple[str, ...]


_Converted = tuple[_Task, list[Entry], list[str]]  # what was done, the samples written, the files that do not decode


def prepare(
    *,
    cache: Path | None = None,
    deb: Path | None = None,
    tree: Path | None = None,
    languages: Sequence[str] = CONCEPT_LANGUAGES,
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Folder of prepared shards; made if it is not there yet.

    Takes `tree`, else `deb`, else an installed copy, else downloads the package into `cache`; warns of one that it was
    given and has no need of. languages=("all",) takes every language with a caption. Raises RunError saying what to do
    if there is no way to the files.
    """
    if workers < 0:
        raise ConfigError(f"stamps: workers is {workers}, expected at least 0")
    cache = (cache or settings.current().cache).expanduser()
    languages = tuple(dict.fromkeys(languages))
    folder = cache / _folder_name(languages)
    if (
        (manifest := read_manifest(folder))
        and manifest["recipe"] == RECIPE
        and manifest["languages"] == list(languages)
    ):
        if given := tree or deb:
            logger.warning("stamps: %s is not read: %s is there already; delete it to make it anew", given, folder)
        return folder

    with atomic.replacing(folder) as shards:
        shards.mkdir()
        started = time.monotonic()
        tree, source = _source(cache, shards.with_name("unpacked"), deb, tree)
        fetched = time.monotonic()
        scan = tuxpaint.scan(tree)
        concepts = assign_concepts({stamp.image: stamp.captions for stamp in scan.stamps})
        tasks = _plan(shards, scan.stamps, concepts, languages)
        entries, broken = _convert(tasks, workers, progress)
        write_index(shards, entries)
        content = {
            "data": "stamps",
            "recipe": RECIPE,
            "languages": list(languages),
            "licence": LICENCE,
            "source": source,
            "counts": _counts(entries),
            "left_out": {reason: len(names) for reason, names in scan.skipped.items()},
            "broken": broken,
            "seconds": {"fetch": round(fetched - started, 1), "prepare": round(time.monotonic() - fetched, 1)},
            "versions": _versions(),
        }
        (shards / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder, or None where there is no complete one."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def is_stamps(folder: Path) -> bool:
    """Whether `prepare` made this folder of shards, wherever it lies."""
    manifest = read_manifest(folder)
    return isinstance(manifest, dict) and manifest.get("data") == "stamps"


def verify(folder: Path) -> dict[str, tuple[int, int]]:
    """Counted and expected images, concepts and images per split, {"images": (950, 950), ...}: they must be equal."""
    counts = _counts(read_index(folder))
    found = {"images": counts["images"], "concepts": counts["concepts"]}
    found |= {f"{split} images": counts["splits"].get(split, {}).get("images", 0) for split in SPLITS}
    return {name: (found[name], expected) for name, expected in EXPECTED.items()}


def _folder_name(languages: tuple[str, ...]) -> str:
    if languages == CONCEPT_LANGUAGES:
        return "stamps"
    return "stamps-" + "-".join(languages) if len(languages) <= 12 else f"stamps-{len(languages)}-languages"


def _source(cache: Path, unpacked: Path, deb: Path | None, tree: Path | None) -> tuple[Path, dict[str, str]]:
    if tree is None and deb is None:
        tree = tuxpaint.find_tree()
    if tree is not None:
        return tuxpaint.find_tree(tree), {"tree": str(tree)}
    if deb is None:
        logger.info("fetching %s (161 MB) into %s", tuxpaint.PACKAGE, cache)
        deb = tuxpaint.download(cache)
    return tuxpaint.unpack(deb, unpacked), tuxpaint.describe(deb)


def _plan(
    into: Path, stamps: list[tuxpaint.Stamp], concepts: dict[str, str], languages: tuple[str, ...]
) -> list[_Task]:
    if languages == ("all",):
        languages = tuple(sorted({tag for stamp in stamps for tag in (*stamp.captions, *stamp.speech)}))
    by_split: dict[str, list[tuxpaint.Stamp]] = {}
    # Mixed by hash, so that each shard holds all categories: readers that stream shards shuffle only locally.
    for stamp in sorted(stamps, key=lambda stamp: hashlib.sha256(stamp.image.encode()).digest()):
        by_split.setdefault(split_of(concepts[stamp.image]), []).append(stamp)
    tasks = []
    for split, members in sorted(by_split.items()):
        for number, start in enumerate(range(0, len(members), IMAGES_PER_SHARD)):
            part = members[start : start + IMAGES_PER_SHARD]
            own = {stamp.image: concepts[stamp.image] for stamp in part}
            tasks.append(_Task(into / f"stamps-{split}-{number:05d}.tar", split, part, own, languages))
    return tasks


def _convert(tasks: list[_Task], workers: int, progress: bool) -> tuple[list[Entry], list[str]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    entries, broken = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        row = bar.add_task("preparing stamps (images)", total=sum(len(task.stamps) for task in tasks))
        for task, task_entries, task_broken in _run(tasks, workers):
            entries += task_entries
            broken += task_broken
            bar.advance(row, len(task.stamps))
    return entries, sorted(broken)


def _run(tasks: list[_Task], workers: int) -> Iterator[_Converted]:
    """Results in order of completion, from worker processes, or from this one if workers is 0."""
    if workers == 0:
        yield from map(_write_task, tasks)
        return
    # spawn: the parent may hold threads (progress bar, torch), which do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_write_task, task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_task(task: _Task) -> _Converted:
    """One shard; files that do not decode are named, and their samples go without them."""
    broken: list[str] = []
    return task, write_shard(task.shard, _samples(task, broken)), broken


def _samples(task: _Task, broken: list[str]) -> Iterator[dict[str, Any]]:
    for stamp in task.stamps:
        shared: dict[str, Any] = {
            "concept": task.concepts[stamp.image],
            "category": stamp.category,
            "split": task.split,
            "image": stamp.image,
            "data": "stamps",
        }
        png = None
        try:
            picture = media.limit_area(media.flatten(media.open_image(stamp.image_file)), MAX_AREA)
            png = media.encode_png(picture)  # once; every language gets the same bytes
            shared["image_size"] = [picture.height, picture.width]
        except Exception as error:  # decoders raise what they like; the file is named and left out
            broken.append(f"{stamp.image}{stamp.image_file.suffix}: {error}")
        for language in task.languages:
            flac, meta = None, dict(shared, lang=language)
            if language in stamp.speech:
                try:
                    waveform = media.decode_speech(stamp.speech[language])
                    flac = media.encode_flac(waveform)
                    meta["audio_samples"] = len(waveform)
                except Exception as error:
                    broken.append(f"{stamp.speech[language].name}: {error}")
            caption = stamp.captions.get(language)
            if caption is None and flac is None:
                continue  # an image alone says nothing in this language
            members = {"txt": caption, "png": png, "flac": flac, "json": meta}
            key = f"{stamp.image}/{language}".replace(".", "-")  # a dot would end the key
            yield {"__key__": key, **{name: value for name, value in members.items() if value is not None}}


def _counts(entries: list[Entry]) -> dict[str, Any]:
    def count(group: list[Entry]) -> dict[str, int]:
        return {
            "samples": len(group),
            "images": len({entry.meta["image"] for entry in group}),
            "concepts": len({entry.meta["concept"] for entry in group}),
            "with_text": sum("txt" in entry.members for entry in group),
            "with_image": sum("png" in entry.members for entry in group),
            "with_speech": sum("flac" in entry.members for entry in group),
        }

    splits: dict[str, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(entry.meta["split"], []).append(entry)
    triples = Counter(entry.meta["lang"] for entry in entries if {"txt", "png", "flac"} <= entry.members.keys())
    return {
        **count(entries),
        "splits": {name: count(group) for name, group in splits.items()},
        "triples": dict(triples),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("pillow", "soundfile", "soxr", "resvg_py", "webdataset")}

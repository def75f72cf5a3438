"""Files and folders that appear whole or not at all, whoever stops the process that writes them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SUFFIX = ".mmmodel-partial"
NEW = 3600  # seconds since the last write after which a folder without a lock is taken for left
OLD = ".replaced"  # what was at the place of a new folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file or a folder, which takes the place of `path` once the context ends without an error.

    Its parent is the writer's own and goes in any case.  Of two writers at once the later one's file stays; of a
    folder, which somebody may be reading by then, the earlier one's.
    """
    with private_folder(path.parent, path.name) as work:
        before = _number(path)
        partial = work / path.name
        yield partial
        folder = partial.is_dir()
        if folder and path.is_dir():  # a folder replaces none that holds something
            if _number(path) != before:
                return
            os.replace(path, work / OLD)  # stopped after this move, `_finish` does the next
        try:
            os.replace(partial, path)
        except OSError:
            if not (folder and path.is_dir()):  # else another process made it in between
                raise


@contextmanager
def private_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` for as long as the context lasts; what processes left there that were killed goes too.

    A lock on the folder says that its process lives, for a process number says little to another container, or to
    another host: there, where the file system has locks between hosts.  What was written within the hour stays anyhow.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_left(parent)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=SUFFIX, dir=parent))
    except OSError as error:  # by the name that its writer knows
        raise OSError(error.errno, error.strerror, str(parent / name)) from error
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system that locks no folders: there nothing is ever taken for left
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
    finally:
        try:
            _finish(work)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def remove_left(parent: Path, *, older: float = NEW) -> None:
    """Removes what processes left in `parent` that were killed, if its last write is `older` than so many seconds.

    0 is for who knows that nobody else writes there.
    """
    for work in parent.glob(f".*{SUFFIX}"):
        with suppress(OSError):  # its process lives, or another was faster to remove it
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)  # of a pipe it would wait for a writer
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                age = time.time() - _last_write(work)
                _finish(work)
                if age > older:
                    shutil.rmtree(work)
            finally:
                os.close(lock)


def _finish(work: Path) -> None:
    """Moves a new folder to its place, if its writer was stopped after it had moved the old one away."""
    name = work.name.removeprefix(".").removesuffix(SUFFIX).rpartition(".")[0]
    if os.path.lexists(work / OLD) and (work / name).exists() and not (work.parent / name).exists():
        os.replace(work / name, work.parent / name)


def _last_write(work: Path) -> float:
    return max(path.lstat().st_mtime for path in (work, *work.rglob("*")))


def _number(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None

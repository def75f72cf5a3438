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
NEW = 60  # seconds in which a folder may not be locked yet by the process that made it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file or a folder, which takes the place of `path` once the context ends without an error.

    Its parent is the writer's own and goes in any case.  Of two writers at once the later one's file stays; of a
    folder, which somebody may be reading by then, the earlier one's.
    """
    before = _number(path)
    with private_folder(path.parent, path.name) as work:
        partial = work / path.name
        yield partial
        if partial.is_dir() and path.is_dir():  # a folder replaces none that holds something
            if _number(path) != before:
                return
            os.replace(path, work / "replaced")
        os.replace(partial, path)


@contextmanager
def private_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` for as long as the context lasts; what processes left there that were killed goes too.

    A lock on the folder says that its process lives, for a process number says little to another container or host.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_left(parent)
    work = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=SUFFIX, dir=parent))
    lock = os.open(work, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that locks no folders: there nothing is ever taken for left
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def _remove_left(parent: Path) -> None:
    for work in parent.glob(f".*{SUFFIX}"):
        with suppress(OSError):  # its process lives, or another was faster to remove it
            lock = os.open(work, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock).st_mtime > NEW:
                    shutil.rmtree(work)
            finally:
                os.close(lock)


def _number(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None

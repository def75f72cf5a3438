"""JSON files of results: read, and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path


def read(path: Path) -> dict:
    """What `write` wrote; empty where there is no such file, or one of another kind."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(document: dict, path: Path) -> None:
    """The whole file or, where this is cut off, what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


def refuse_unwritable(path: Path) -> None:
    """OSError where `write` would fail: before a run of minutes, not behind it.  Leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    lacking = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _part(path).touch()
        _part(path).unlink()
    finally:
        for folder in lacking:  # what is refused for another reason must not leave a folder
            with contextlib.suppress(OSError):
                folder.rmdir()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")

"""A plain loop over tarfile, with pillow and soundfile: members of one key stand together and make a sample."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import numpy as np
import soundfile
from PIL import Image

from benchmarks.harness import Implementation

NAME = "tarfile"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    paths = sorted(problem.folder.glob("*.tar"))
    if problem.order is None:
        return Implementation(NAME, lambda: dict(sample for path in paths for sample in _stream(path)))
    # Where each member is, is looked up before the clock starts, as our index was read.
    archives = [tarfile.open(path) for path in paths]  # noqa: SIM115  (open as long as the benchmark runs)
    members: dict[str, list] = {}
    for archive in archives:
        for info in archive.getmembers():
            members.setdefault(info.name.split(".")[0], []).append((archive, info))

    def read() -> dict:
        return {
            key: decode({info.name.split(".")[1]: archive.extractfile(info).read() for archive, info in members[key]})
            for key in problem.order
        }

    return Implementation(NAME, read)


def _stream(path) -> Iterator[tuple[str, tuple]]:
    with tarfile.open(path) as archive:
        key, parts = None, {}
        for info in archive:
            name, extension = info.name.split(".")
            if name != key and parts:
                yield key, decode(parts)
                parts = {}
            key = name
            parts[extension] = archive.extractfile(info).read()
        if parts:
            yield key, decode(parts)


def decode(parts: dict[str, bytes]) -> tuple:
    """(caption, uint8 [H, W, 3], float32 [samples]), None for what is missing."""
    text = parts["txt"].decode() if "txt" in parts else None
    image = np.array(Image.open(io.BytesIO(parts["png"])).convert("RGB")) if "png" in parts else None
    sound = soundfile.read(io.BytesIO(parts["flac"]), dtype="float32")[0] if "flac" in parts else None
    return text, image, sound

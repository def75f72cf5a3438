"""tarfile with pillow and soundfile; archives open and their members listed, as who reads more than once has them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import soundfile
from PIL import Image

from benchmarks.harness import Implementation

NAME = "tarfile"


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    archives = [tarfile.open(path) for path in sorted(problem.folder.glob("*.tar"))]  # noqa: SIM115  (as long as it runs)
    members: dict[str, list] = {}
    for archive in archives:
        for info in archive.getmembers():
            key, extension = info.name.split(".")
            members.setdefault(key, []).append((extension, archive, info))

    def read() -> dict:
        return {
            key: decode({extension: archive.extractfile(info).read() for extension, archive, info in members[key]})
            for key in (members if problem.order is None else problem.order)
        }

    return Implementation(NAME, read)


def decode(parts: dict[str, bytes]) -> tuple:
    """(caption, uint8 [H, W, 3], float32 [samples]), None for what is missing."""
    text = parts["txt"].decode() if "txt" in parts else None
    image = np.array(Image.open(io.BytesIO(parts["png"])).convert("RGB")) if "png" in parts else None
    sound = soundfile.read(io.BytesIO(parts["flac"]), dtype="float32")[0] if "flac" in parts else None
    return text, image, sound

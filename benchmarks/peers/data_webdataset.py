"""webdataset's own pipeline over the same shards, decoding with its image handler and soundfile.

Archives are opened and their headers read in each call: it has no form that keeps them.
"""

from __future__ import annotations

import io

import soundfile

from benchmarks.harness import Implementation
from benchmarks.peers.packed import installed

NAME = "webdataset"


def missing(problem) -> str | None:
    if problem.order is not None:
        return "reads shards in order (its shuffle is a buffer of neighbours)"
    return None if installed("webdataset") else "not installed"


def build(problem) -> Implementation:
    import webdataset

    urls = sorted(str(path) for path in problem.folder.glob("*.tar"))

    def flac(key: str, data: bytes):
        return soundfile.read(io.BytesIO(data), dtype="float32")[0] if key.endswith("flac") else None

    def read() -> dict:
        samples = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8", flac)
        return {s["__key__"]: (s.get("txt"), s.get("png"), s.get("flac")) for s in samples}

    return Implementation(NAME, read)

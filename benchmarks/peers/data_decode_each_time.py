"""Batches whose features are decoded and prepared anew each epoch, as a data set class without a cache does."""

from __future__ import annotations

from benchmarks.harness import Implementation

NAME = "decode each time"
READERS = {"text": "read_text", "image": "read_image", "audio": "read_waveform"}


def missing(problem) -> str | None:
    return None


def build(problem) -> Implementation:
    row_of = {key: row for row, key in enumerate(problem.dataset.keys)}

    def read(name: str, key: str):
        return getattr(problem.dataset, READERS[name])(row_of[key])

    values = problem.prepared(read)
    return Implementation(NAME, lambda: problem.batches(values), packed=problem.tensors)

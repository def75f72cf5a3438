"""Data problems: samples decoded from tar shards, in order and shuffled; batches made of features in memory.

The data are the synthetic set, written to a temporary folder, so the files are in the page cache: what is measured is
reading, decoding and collating, not a disk.   One sample: a caption, a PNG, a FLAC, any of them missing.

A call is an epoch of a run under way.  What can be kept from one epoch to the next is there before the clock starts,
for everybody: open files, our index, tarfile's lists of members, features in memory.  webdataset keeps nothing: its
pipeline opens the archives and reads their headers in each epoch, of a run too.
"""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks.harness import PREFIX, Implementation, Missing, Work
from benchmarks.peers import data_decode_each_time, data_tarfile, data_webdataset, peer_rows
from mmmodel import configs, features, frontends
from mmmodel.batches import collate
from mmmodel.data import synthetic
from mmmodel.data.loader import ShardDataset
from mmmodel.frontends.text import train_tokenizer

SECONDS = {"quick": 20, "full": 120}
SAMPLES = {"quick": 128, "full": 2000}
BATCH = 32
PARTS = ("text", "image", "audio")
Decoded = tuple[str | None, np.ndarray | None, np.ndarray | None]  # caption, uint8 [H, W, 3], float32 [samples]


@dataclass
class ShardProblem:
    """Every sample of `folder`, decoded, by key; `order` None as the shards have them, else keys."""

    case: str
    folder: Path
    order: list[str] | None
    expected: dict[str, Decoded]
    keep: Any = None  # the temporary folder lives as long as the problem
    peers: tuple[ModuleType, ...] = (data_tarfile, data_webdataset)
    op: str = field(default="data", init=False)
    dtype: str = field(default="files", init=False)
    directions: tuple[str, ...] = field(default=("fwd",), init=False)

    def implementations(self) -> Iterator[Implementation | Missing]:
        dataset = ShardDataset(self.folder)
        row_of = {key: row for row, key in enumerate(dataset.keys)}
        rows = list(range(len(dataset))) if self.order is None else [row_of[key] for key in self.order]

        def read() -> dict[str, Decoded]:
            samples = (dataset[row] for row in rows)
            return {sample.key: (sample.text, sample.image, sample.waveform) for sample in samples}

        yield Implementation(PREFIX + "shards", read)
        yield from peer_rows(self, self.peers)

    def check(self, direction: str, results: list) -> str | None:
        found = results[0]
        if found.keys() != self.expected.keys():
            return f"wrong: {len(found)} samples, expected {len(self.expected)}, or other keys"
        for key, parts in self.expected.items():
            for name, part, right in zip(("caption", "image", "sound"), found[key], parts, strict=True):
                same = part == right if name == "caption" else _equal(part, right)
                if not same:
                    return f"wrong: {name} of {key}"
        return None

    def work(self, direction: str) -> Work:
        return Work(len(self.expected), "samples/s", 0, None)


@dataclass
class BatchProblem:
    """One epoch in batches of BATCH, collated and with their layout, without augmentation.

    stored  features.Features, as a run keeps them in memory
    drawn   the samples as they were drawn, by key: what the oracle prepares features from
    """

    case: str
    dataset: ShardDataset
    front_ends: Any
    special: tuple[int | None, ...]
    items: list
    stored: features.Features
    drawn: dict[str, Decoded]
    keep: Any = None
    peers: tuple[ModuleType, ...] = (data_decode_each_time,)
    op: str = field(default="data", init=False)
    dtype: str = field(default="files", init=False)
    directions: tuple[str, ...] = field(default=("fwd",), init=False)

    def implementations(self) -> Iterator[Implementation | Missing]:
        yield Implementation(PREFIX + "features", lambda: self.batches(self.stored), packed=self.tensors)
        yield from peer_rows(self, self.peers)

    def batches(self, values) -> list:
        """values.get(modality, row) gives features: features.Features, or Prepared."""
        starts = range(0, len(self.items) - BATCH + 1, BATCH)
        return [collate(self.items[i : i + BATCH], values, self.front_ends, self.special) for i in starts]

    def prepared(self, read: Callable[[str, str], Any]) -> Prepared:
        return Prepared(self.front_ends, self.items, read)

    @staticmethod
    def tensors(batches: list) -> list[torch.Tensor]:
        """All that the batches hold, in one order."""
        found = []
        for batch in batches:
            layout = batch.layout
            found += [tensor for name in batch.inputs for tensor in batch.inputs[name]]
            found += [layout.cu_seqlens, layout.modality_ids, layout.positions, layout.source_rows, batch.concept]
        return found

    def check(self, direction: str, results: list) -> str | None:
        """Bit by bit against features of the samples as drawn: no shard, no index and no cache between."""
        if len(results[0]) != len(self._expected):
            return f"wrong: {len(results[0])} tensors, expected {len(self._expected)}"
        wrong = [i for i, (a, b) in enumerate(zip(results[0], self._expected, strict=True)) if not torch.equal(a, b)]
        return f"wrong: tensor {wrong[0]} of the batches" if wrong else None

    def work(self, direction: str) -> Work:
        return Work(len(self.items) // BATCH * BATCH, "samples/s", 0, None)

    @functools.cached_property
    def _expected(self) -> list[torch.Tensor]:
        values = self.prepared(lambda name, key: self.drawn[key][PARTS.index(name)])
        return self.tensors(self.batches(values))


class Prepared:
    """Features made at each request, by the front ends, from read(modality, key)."""

    def __init__(self, front_ends, items: list, read: Callable[[str, str], Any]) -> None:
        self.front_ends, self.read = front_ends, read
        self.key_of = {(name, row): item.key for item in items for name, row in item.rows.items()}

    def get(self, name: str, row: int) -> np.ndarray:
        return self.front_ends[name].prepare(self.read(name, self.key_of[name, row]))


def problems(shapes: str, device: torch.device, seed: int) -> Iterator[ShardProblem | BatchProblem]:
    if device.type != "cpu":
        raise ValueError(f"benchmarks data: device is {device.type}, loading runs on the host (--device cpu)")
    yield from build(SAMPLES[shapes], seed)


def build(samples: int, seed: int) -> Iterator[ShardProblem | BatchProblem]:
    keep = tempfile.TemporaryDirectory(prefix="mm-data-")
    folder = synthetic.prepare(Path(keep.name) / "shards", samples=samples, seed=seed)
    drawn = (synthetic.make_sample(seed, index) for index in range(samples))
    expected = {sample["__key__"]: _decode(sample) for sample in drawn}
    shuffled = np.random.default_rng(seed).permutation(sorted(expected)).tolist()
    yield ShardProblem(f"shards in order, synthetic n{samples}", folder, None, expected, keep)
    yield ShardProblem(f"shards shuffled, synthetic n{samples}", folder, shuffled, expected, keep)

    config = configs.preset("quick").model
    dataset = ShardDataset(folder)
    tokenizer = train_tokenizer([text for _, text in features.read_captions(dataset, "train")], config.text.vocab_size)
    front_ends = frontends.build(config, tokenizer)
    special = frontends.special_tokens(front_ends, tokenizer)
    items, stored = features.prepare(dataset, front_ends, Path(keep.name) / "cache", threads=2)
    case = f"batches of {BATCH}, synthetic n{samples}"
    yield BatchProblem(case, dataset, front_ends, special, items, stored, expected, keep)


def _decode(sample: dict) -> Decoded:
    image = np.array(Image.open(io.BytesIO(sample["png"])).convert("RGB")) if "png" in sample else None
    sound = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")[0] if "flac" in sample else None
    return sample.get("txt"), image, sound


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and np.array_equal(a, b)

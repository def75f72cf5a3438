"""Vectors of samples from a trained run: one per modality, comparable across modalities, and one of the whole sample.

P width of the space in which modalities are compared, E model width, T tokens, N segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmkernels.ops.packing.api import segment_mean
from mmmodel import export, limits, pretraining, tables
from mmmodel import features as feature_store
from mmmodel.batches import Batch, collate
from mmmodel.configs import ConfigError
from mmmodel.data import media
from mmmodel.data.loader import ShardDataset
from mmmodel.features import Features, Item
from mmmodel.finetuning import weights
from mmmodel.finetuning.learner import sample_mean
from mmmodel.model import Model, check_impl

BATCH = 64
JOINT = "joint"
COLUMNS = {"key": "text", "modality": "text", "vector": "vector"}
EXPECTED = {
    "text": "a str",
    "image": "a path, a PIL image or uint8 [h, w, 3]",
    "audio": "a path or float [n] at 16 kHz",
}
RAW = {"image": (3, (3,), "u"), "audio": (1, (), "f")}  # rank, further axes and kind of dtype of an array
Read = Callable[[Batch], Tensor]


class Embedder:
    """The model of a run, pretrained or fine-tuned, in eval mode.  Reading unpickles nothing.

    impl: as in `export.open_run`.

    A modality's vector is its point in the contrastive space, [P] of unit length; where the run has none, the mean of
    its last hidden states, [E].  Raises CheckpointError for a run that does not read or does not fit.
    """

    def __init__(self, run: Path | str, *, device: torch.device | str = "cpu", impl: str | None = None) -> None:
        limits.check_device(str(device), "embed")
        opened = export.open_run(run, impl=impl)
        self.config = opened.config
        check_impl(self.config.model.impl, device)
        learner = weights.learner_of(opened).to(device)
        self.model: Model = learner.model
        self.contrastive: nn.Module | None = dict(learner.objectives.items()).get("contrastive")

    def prepare(self, dataset: ShardDataset) -> tuple[list[Item], Features]:
        """Items and features of a data set, from the cache where they are there."""
        return feature_store.prepare(dataset, self.model.front_ends, threads=self.config.threads)

    def vectors(self, items: Sequence[Item], features: Features) -> dict[str, np.ndarray]:
        """Per modality float32 [len(items), P]; a row of NaN where an item lacks the modality."""
        return segment_vectors(self.model, items, features, self._read)

    def joint(self, items: Sequence[Item], features: Features) -> np.ndarray:
        """Mean hidden state of each whole sample, its modalities seeing each other, float32 [len(items), E]."""
        return sample_vectors(self.model, items, features, lambda batch: sample_mean(self.model(batch), batch.layout))

    def _read(self, batch: Batch) -> Tensor:
        packed = self.model(batch, self.model.isolated())
        if self.contrastive is None:
            return segment_mean(packed, batch.layout)
        return self.contrastive.points(packed, batch.layout, batch.modality)


def embed_one(embedder: Embedder, **raw: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """The vector of one text, picture or sound, as `Embedder.vectors` has it: embed_one(embedder, text="a red star").

    raw: one modality by its name, as in `one_sample`.  For a whole sample there is `embedder.joint([item], features)`.
    """
    if len(raw) != 1:
        raise ConfigError(f"embed_one: got {', '.join(raw) or 'nothing'}, expected one of text=, image=, audio=")
    item, features = one_sample(embedder.model, **raw)
    return embedder.vectors([item], features)[next(iter(raw))][0]


def one_sample(model: Model, **raw: str | Path | Image.Image | np.ndarray) -> tuple[Item, Features]:
    """A sample that is in no data set, its modalities by name, and its features.

    text is a str; image a path, a PIL image, or uint8 [h, w, 3]; audio a path, or float [n] at 16 kHz, mono.  What a
    data set leaves out is refused: a blank text, sound that is shorter than 10 ms or holds NaN.  Raises ConfigError for
    that, for a modality that the model does not read and for what does not decode, FileNotFoundError for no file.
    """
    arrays = {}
    for name, value in raw.items():
        if name not in model.front_ends:
            raise ConfigError(f"embed: the model reads {', '.join(model.front_ends)}, not {name}")
        front_end = model.front_ends[name]
        try:
            arrays[name] = [front_end.prepare(_decoded(name, value, front_end))]
        except FileNotFoundError:
            raise
        except Exception as error:  # decoders raise what they like
            expected = EXPECTED.get(name, "a path")
            raise ConfigError(f"embed: {name} does not read, expected {expected}: {error}") from error
    return Item("", "", "", "", "", dict.fromkeys(raw, 0)), Features.of(arrays)


def _decoded(name: str, value: Any, front_end: nn.Module) -> Any:
    """As a data set gives it to `front_end.prepare`; an error for what it would leave out."""
    if name == "text":
        if not isinstance(value, str):
            raise ValueError(f"it is {type(value).__name__}")
        if (text := front_end.decode(value.encode())) is None:
            raise ValueError("it is blank")
        return text
    if isinstance(value, str | Path):
        return front_end.decode(Path(value).read_bytes())
    if name == "image" and isinstance(value, Image.Image):
        return media.pixels(value.copy())
    if name in RAW:
        value = np.asarray(value)
        if (value.ndim, value.shape[2:], value.dtype.kind) != RAW[name] or 0 in value.shape:
            raise ValueError(f"it is {value.dtype} {list(value.shape)}")
        if name == "audio":
            media.refuse_infinite(value)
            media.refuse_short(value)
    return value


@torch.no_grad()
def segment_vectors(model: Model, items: Sequence[Item], features: Features, read: Read) -> dict[str, np.ndarray]:
    """Per modality the vectors [len(items), width] that read(batch) [N, width] gives, each segment by itself.

    Rows of NaN where an item lacks the modality.  Features that several items share, a picture captioned in many
    languages, are computed once.
    """
    names = list(model.front_ends)
    first: dict[tuple[str, int], int] = {}  # (modality, feature row) -> the item that computes it
    own = []
    for i, item in enumerate(items):
        rows = {name: row for name, row in item.rows.items() if first.setdefault((name, row), i) == i}
        if rows:
            own.append((i, replace(item, rows=rows)))
    vectors: dict[str, np.ndarray] = {}
    for start in range(0, len(own), BATCH):
        numbers, part = zip(*own[start : start + BATCH], strict=True)
        batch = make_batch(model, part, features)
        found = read(batch).float().cpu().numpy()
        for name in names if not vectors else ():
            vectors[name] = np.full((len(items), found.shape[1]), np.nan, np.float32)
        for vector, (sample, modality, _, _) in zip(found, batch.layout.segments.tolist(), strict=True):
            vectors[names[modality]][numbers[sample]] = vector
    for i, item in enumerate(items):
        for name, row in item.rows.items():
            vectors[name][i] = vectors[name][first[name, row]]
    return vectors


@torch.no_grad()
def sample_vectors(model: Model, items: Sequence[Item], features: Features, read: Read) -> np.ndarray:
    """The vectors [len(items), width] that read(batch) [B, width] gives, batch by batch."""
    found = [
        read(make_batch(model, items[start : start + BATCH], features)).float().cpu().numpy()
        for start in range(0, len(items), BATCH)
    ]
    return np.concatenate(found)


def make_batch(
    model: Model, items: Sequence[Item], features: Features, rng: np.random.Generator | None = None
) -> Batch:
    """Packed items on the model's device; augmented where rng is given."""
    return collate(items, features, model.front_ends, model.special_tokens, rng).to(model.token_table.device)


def write(
    path: Path | str,
    run: Path | str,
    data: str = "",
    *,
    split: str | None = None,
    languages: Sequence[str] = (),
    joint: bool = True,
    device: str = "cpu",
    impl: str | None = None,
) -> int:
    """Write a table of key, modality and vector, a row for each modality of each sample, and with `joint` one for the
    sample; returns the number of rows.  path ends in .parquet, .csv or .jsonl.

    data: as in `pretraining.find_data`; empty: what the run was trained on.  The file appears whole or not at all.
    Raises ConfigError if no sample has the split and a language, or for another suffix.
    """
    path = Path(path)
    embedder = Embedder(run, device=device, impl=impl)
    tables.check(path)
    torch.set_num_threads(embedder.config.threads)
    languages = tuple(languages) or (embedder.config.languages if not data else ())
    dataset = pretraining.open_shards(data or embedder.config.data, languages, split)
    items, features = embedder.prepare(dataset)
    if not items:
        known = ", ".join(embedder.model.front_ends)
        raise ConfigError(f"embed: none of the {len(dataset)} samples of {dataset.path} has any of {known} that reads")
    about = {"run": str(run), "data": str(dataset.path)}
    return tables.write(path, COLUMNS, _rows(embedder, items, features, joint), about)


def segment_rows(items: Sequence[Item], vectors: dict[str, np.ndarray]) -> Iterator[list[tuple[str, str, np.ndarray]]]:
    """Rows of COLUMNS for what `segment_vectors` gave, one modality after the other."""
    for name, found in vectors.items():
        yield [(item.key, name, found[i]) for i, item in enumerate(items) if name in item.rows]


def _rows(embedder: Embedder, items: list[Item], features: Features, joint: bool) -> Iterator[tables.Rows]:
    yield from segment_rows(items, embedder.vectors(items, features))
    if joint:
        keys = [item.key for item in items]
        yield [(key, JOINT, vector) for key, vector in zip(keys, embedder.joint(items, features), strict=True)]

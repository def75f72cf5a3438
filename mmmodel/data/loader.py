"""Samples from indexed shards: a map-style dataset, and batches of it through torch's DataLoader, less broken samples.

Decoding is pillow and libsndfile; reading is one `pread` per member, so threads and worker processes share nothing.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmmodel.data import media
from mmmodel.data.plan import BatchPlan
from mmmodel.data.shards import AUDIO, IMAGE, TEXT, Entry, read_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    key: str
    text: str | None
    image: np.ndarray | None  # uint8 [H, W, 3]
    waveform: np.ndarray | None  # float32 [samples], 16 kHz, mono
    meta: dict[str, Any] = field(default_factory=dict)  # KEY.json: lang, concept, category, split, image, ...


class BrokenSampleError(ValueError):
    """A member of a sample does not decode; names the sample."""


class TooManyBrokenSamplesError(RuntimeError):
    """So many samples in a row do not decode that the data, not a sample, is at fault."""


class ShardDataset(Dataset):
    """The samples of a folder of shards, or of one split and some languages of it, in index order.

    Metadata (`keys`, `metas`) is read without decoding. `dataset[i]` decodes a sample; `read_text`, `read_image` and
    `read_waveform` decode one member of it, for who wants to decode an image once for all its languages.
    Raises ValueError if nothing is selected, saying what there is.
    """

    def __init__(self, path: Path | str, split: str | None = None, languages: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        entries = read_index(self.path)
        self.entries: list[Entry] = [
            entry
            for entry in entries
            if (split is None or entry.meta.get("split") == split)
            and (languages is None or entry.meta.get("lang") in languages)
        ]
        if not self.entries:
            splits = sorted({str(entry.meta.get("split")) for entry in entries})
            known = sorted({str(entry.meta.get("lang")) for entry in entries})
            raise ValueError(
                f"ShardDataset: no sample of {self.path} has split {split!r} and a language in {languages}; "
                f"there are splits {splits} and languages {known}"
            )
        self._files: dict[str, BufferedReader] = {}

    @property
    def keys(self) -> list[str]:
        return [entry.key for entry in self.entries]

    @property
    def metas(self) -> list[dict[str, Any]]:
        return [entry.meta for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        text, image, waveform = self.read_text(index), self.read_image(index), self.read_waveform(index)
        return Sample(self.entries[index].key, text, image, waveform, self.entries[index].meta)

    def read_text(self, index: int) -> str | None:
        return self._read(index, TEXT, lambda data: data.decode("utf-8").strip())

    def read_image(self, index: int) -> np.ndarray | None:
        return self._read(index, IMAGE, media.decode_image)

    def read_waveform(self, index: int) -> np.ndarray | None:
        return self._read(index, AUDIO, media.decode_speech)

    def _read(self, index: int, extensions: tuple[str, ...], decode: Callable[[bytes], Any]) -> Any:
        entry = self.entries[index]
        where = entry.member(extensions)
        if where is None:
            return None
        offset, size = where
        try:
            data = os.pread(self._file(entry.shard).fileno(), size, offset)
            if len(data) != size:
                raise ValueError(f"{entry.shard} ends after {len(data)} of {size} bytes")
            return decode(data)
        except Exception as error:  # decoders raise what they like
            kind = next(extension for extension in extensions if extension in entry.members)
            raise BrokenSampleError(f"{entry.key}.{kind}: {type(error).__name__}: {error}") from error

    def _file(self, shard: str) -> BufferedReader:
        if shard not in self._files:  # of two threads that open at once, one file is dropped and so closed
            self._files.setdefault(shard, (self.path / shard).open("rb"))
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


class BatchLoader:
    """Batches of decoded samples in the order of a plan, in worker processes if asked.

    A broken sample is logged with its key, counted in `broken` and left out of its batch; more than
    `max_consecutive_failures` in a row raise TooManyBrokenSamplesError. The plan advances as a batch is handed out, not
    as it is read ahead, so `state_dict()` between two batches names the next one. `collate` runs in the worker.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        plan: BatchPlan,
        *,
        collate: Callable[[list[Sample]], Any] = list,
        workers: int = 0,
        max_consecutive_failures: int = 10,
    ) -> None:
        if plan.num_samples != len(dataset):
            raise ValueError(
                f"BatchLoader: plan is for {plan.num_samples} samples, expected the dataset's {len(dataset)}"
            )
        self.dataset, self.plan, self.workers = dataset, plan, workers
        self.collate, self.max_consecutive_failures = collate, max_consecutive_failures
        self.broken: dict[str, str] = {}  # key -> reason

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            _Tolerant(self.dataset),
            batch_sampler=self.plan,
            num_workers=self.workers,
            collate_fn=_Collate(self.collate),
        )
        consecutive = 0
        for batch, outcomes in loader:
            for failure in outcomes:
                consecutive = consecutive + 1 if failure else 0
                if failure:
                    if failure.key not in self.broken:
                        logger.warning("left out a broken sample: %s", failure.reason)
                    self.broken[failure.key] = failure.reason
                if consecutive > self.max_consecutive_failures:
                    raise TooManyBrokenSamplesError(
                        f"{consecutive} samples in a row do not decode, more than "
                        f"max_consecutive_failures={self.max_consecutive_failures}; the last: {failure.reason}"
                    )
            self.plan.advance()
            if batch is not None:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plan.load_state_dict(state)


@dataclass(frozen=True)
class _Failure:
    key: str
    reason: str


class _Tolerant(Dataset):
    """A dataset whose broken samples are values, since an exception would end a worker."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | _Failure:
        try:
            return self.dataset[index]
        except BrokenSampleError as error:
            return _Failure(self.dataset.entries[index].key, str(error))


@dataclass(frozen=True)
class _Collate:
    """(collate of the good samples, or None; per sample its failure, or None, in order)."""

    collate: Callable[[list[Sample]], Any]

    def __call__(self, items: list[Sample | _Failure]) -> tuple[Any, list[_Failure | None]]:
        good = [item for item in items if isinstance(item, Sample)]
        outcomes = [item if isinstance(item, _Failure) else None for item in items]
        return self.collate(good) if good else None, outcomes

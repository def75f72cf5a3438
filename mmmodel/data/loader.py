"""Samples from indexed shards, as a map-style dataset.

Decoding is pillow and libsndfile; reading is one `pread` per member, so threads and worker processes share nothing.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mmmodel.configs import ConfigError
from mmmodel.data import media
from mmmodel.data.shards import AUDIO, IMAGE, TEXT, Entry, read_index, split_name

MAX_BROKEN_IN_A_ROW = 10  # samples, or rows of a table: more say that all are of a kind that does not read


@dataclass(frozen=True)
class Sample:
    key: str
    text: str | None
    image: np.ndarray | None  # uint8 [H, W, 3]
    waveform: np.ndarray | None  # float32 [samples], 16 kHz, mono
    meta: dict[str, Any] = field(default_factory=dict)  # KEY.json: lang, concept, category, split, image, ...


class BrokenSampleError(ValueError):
    """A member of a sample does not decode; names the sample."""


class NothingSelectedError(ConfigError):
    """No sample is of the split and the languages that were asked for."""


def in_words(error: Exception) -> str:
    """What went wrong; with the kind of the error where its message was not meant for people."""
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


class ShardDataset(Dataset):
    """The samples of a folder of shards, or of one split and some languages of it, in index order.

    A sample without a split in KEY.json, or without that, is of train.

    Metadata (`keys`, `metas`) is read without decoding. `dataset[i]` decodes a sample; `read_text`, `read_image` and
    `read_waveform` decode one member of it, for who wants to decode an image once for all its languages.
    Raises NothingSelectedError if nothing is selected, saying what there is, and ConfigError as `read_index` does.
    """

    def __init__(self, path: Path | str, split: str | None = None, languages: Sequence[str] | None = None) -> None:
        if isinstance(languages, str):  # "fr" would be the languages f and r, and all that have none
            raise ConfigError(f"ShardDataset: languages is {languages!r}, expected several: [{languages!r}]")
        self.path = Path(path)
        entries = read_index(self.path)
        self.entries: list[Entry] = [
            entry
            for entry in entries
            if (split is None or entry.split == split_name(split))
            and (languages is None or entry.language in languages)
        ]
        if not self.entries:
            wanted = [f"split {split!r}"] if split is not None else []
            wanted += [f"a language in {list(languages)}"] if languages is not None else []
            splits = sorted({entry.split for entry in entries})
            known = sorted({entry.language for entry in entries})
            hint = " ('': KEY.json has no lang; languages= takes all)" if languages is not None and "" in known else ""
            raise NothingSelectedError(
                f"ShardDataset: {self.path} holds no sample{' of ' * bool(wanted)}{' and '.join(wanted)}; "
                f"there are splits {splits} and languages {known}{hint}"
            )
        self.others = len(entries) - len(self.entries)  # samples of other splits or languages
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
        return self.read(index, TEXT, media.decode_text)

    def read_image(self, index: int) -> np.ndarray | None:
        return self.read(index, IMAGE, media.decode_image)

    def read_waveform(self, index: int) -> np.ndarray | None:
        return self.read(index, AUDIO, media.decode_speech)

    def read(self, index: int, extensions: tuple[str, ...], decode: Callable[[bytes], Any]) -> Any:
        """What `decode` makes of the sample's member with one of the extensions; None if it has none.

        Raises BrokenSampleError.
        """
        entry = self.entries[index]
        where = entry.member(extensions)
        if where is None:
            return None
        offset, size = where
        try:
            data = os.pread(self._file(entry.shard).fileno(), size, offset)
            if len(data) != size:
                raise ValueError(f"the shard ends after {len(data)} of {size} bytes")
            return decode(data)
        except Exception as error:  # decoders raise what they like
            kind = next(extension for extension in extensions if extension in entry.members)
            raise BrokenSampleError(f"{entry.shard}: {entry.key}.{kind}: {in_words(error)}") from error

    def _file(self, shard: str) -> BufferedReader:
        if shard not in self._files:  # of two threads that open at once, one file is dropped and so closed
            self._files.setdefault(shard, (self.path / shard).open("rb"))
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

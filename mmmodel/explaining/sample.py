"""One sample taken apart: its words, image cells and stretches of sound, and which packed tokens they are.

n tokens of the sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmmodel.batches import Batch, collate
from mmmodel.features import Features, Item
from mmmodel.model import Model


@dataclass(frozen=True)
class Sample:
    """A sample with its features, and what people can read of it."""

    item: Item
    features: Features
    caption: str = ""
    words: tuple[tuple[str, tuple[int, ...]], ...] = ()  # text, positions of its pieces in the text segment

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.item.rows)

    def feature(self, name: str) -> np.ndarray:
        return self.features.get(name, self.item.rows[name])

    def without(self, *names: str) -> Sample:
        """The sample with modalities dropped; those that it lacks anyway change nothing."""
        rows = {name: row for name, row in self.item.rows.items() if name not in names}
        return replace(self, item=replace(self.item, rows=rows))

    def batch(self, model: Model) -> Batch:
        """Packed alone, on the model's device."""
        batch = collate([self.item], self.features, model.front_ends, model.special_tokens)
        return batch.to(model.token_table.device)


def tokens_of(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Per modality present the packed tokens of its segment, special token first where there is one; on the host."""
    ids = batch.layout.modality_ids.cpu()
    found = {name: (ids == m).nonzero().squeeze(1) for m, name in enumerate(model.front_ends)}
    return {name: tokens for name, tokens in found.items() if len(tokens)}


def content(tokens: Tensor) -> Tensor:
    """Without the special token in front ([CLS], [IMG], [AUD])."""
    return tokens[1:]


def words_of(tokenizer, caption: str, length: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Words of a caption and the positions of their pieces among the first `length` ids, [CLS] at 0."""
    encoding = tokenizer.encode(caption, add_special_tokens=False)
    words: dict[int, list[int]] = {}
    for piece, word in enumerate(encoding.word_ids[: length - 1]):
        if word is not None:
            words.setdefault(word, []).append(piece)
    named = []
    for pieces in words.values():
        start, end = encoding.offsets[pieces[0]][0], encoding.offsets[pieces[-1]][1]
        if text := caption[start:end].strip():
            named.append((text, tuple(piece + 1 for piece in pieces)))
    return tuple(named)


def hide_each_word(sample: Sample, mask_id: int) -> tuple[list[Item], Features, Tensor]:
    """A copy of the sample for each piece of its text, with that piece hidden; and the pieces, int64 [n - 1]."""
    ids = sample.feature("text")
    captions = []
    for position in range(1, len(ids)):
        captions.append(ids.copy())
        captions[-1][position] = mask_id
    others = {name: [sample.feature(name)] for name in sample.modalities if name != "text"}
    items = [replace(sample.item, rows={**dict.fromkeys(others, 0), "text": i}) for i in range(len(captions))]
    items = [replace(item, rows={name: item.rows[name] for name in sample.modalities}) for item in items]
    return items, Features.of({**others, "text": captions}), torch.from_numpy(ids[1:].astype(np.int64))

"""One sample taken apart: its words, image cells and stretches of sound, and which packed tokens they are.

n tokens of the sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mmmodel.batches import Batch
from mmmodel.embed import make_batch
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
        return make_batch(model, [self.item], self.features)


def tokens_of(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Per modality present the packed tokens of its segment, special token first where there is one; on the host."""
    ids = batch.layout.modality_ids.cpu()
    found = {name: (ids == m).nonzero().squeeze(1) for m, name in enumerate(model.front_ends)}
    return {name: tokens for name, tokens in found.items() if len(tokens)}


def content(tokens: Tensor) -> Tensor:
    """Without the special token in front ([CLS], [IMG], [AUD])."""
    return tokens[1:]


def pieces_of(ids: np.ndarray, special: np.ndarray) -> np.ndarray:
    """Positions of a caption's word pieces among its ids: all but special tokens."""
    return np.flatnonzero(~np.isin(ids, special))


def words_of(tokenizer, caption: str, positions: np.ndarray) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Words of a caption and the positions of their pieces; what does not fit into the positions is cut off."""
    encoding = tokenizer.encode(caption, add_special_tokens=False)
    words: dict[int, list[int]] = {}
    for piece, word in enumerate(encoding.word_ids[: len(positions)]):
        if word is not None:
            words.setdefault(word, []).append(piece)
    named = []
    for pieces in words.values():
        start, end = encoding.offsets[pieces[0]][0], encoding.offsets[pieces[-1]][1]
        if text := caption[start:end].strip():
            named.append((text, tuple(int(positions[piece]) for piece in pieces)))
    return tuple(named)


def hide_each_word(sample: Sample, positions: np.ndarray, mask_id: int) -> tuple[list[Item], Features]:
    """A copy of the sample for each of these positions of its text, with the piece there hidden."""
    ids = sample.feature("text")
    captions = []
    for position in positions:
        captions.append(ids.copy())
        captions[-1][position] = mask_id
    others = {name: [sample.feature(name)] for name in sample.modalities if name != "text"}
    rows = [{name: i if name == "text" else 0 for name in sample.modalities} for i in range(len(captions))]
    return [replace(sample.item, rows=row) for row in rows], Features.of({**others, "text": captions})

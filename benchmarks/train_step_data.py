"""Samples to train on, drawn from a seed, and their order: as they come, or bucketed by length.   B samples in a batch.

A sample is drawn as raw sizes (tokens, pixels, frames); the preset's own front ends decide what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer, models

from mmmodel.batches import Batch, collate
from mmmodel.configs import ModelConfig
from mmmodel.features import Features, Item
from mmmodel.frontends.image import CELL, fit_grid
from mmmodel.frontends.text import SPECIAL_TOKENS


@dataclass(frozen=True)
class Raw:
    """0 or None where the sample lacks the modality."""

    tokens: int  # of the caption, [CLS] included
    pixels: tuple[int, int] | None  # height, width
    frames: int  # of 10 ms


def stamps(rng: np.random.Generator) -> Raw:
    """Like the 2,848 Tux Paint samples in French, Spanish and Russian.

    Their percentiles 5, 50 and 95: 5, 12, 44 tokens; 9, 99, 800 cells of 16 x 16 pixels (mean 216, at most 1,024);
    68, 116, 360 frames; the logarithm of the aspect ratio has deviation 0.48; 4 % have no speech.
    """
    speech = 50 + _lognormal(rng, 66, 0.95, 0, 1550) if rng.random() < 0.96 else 0
    return Raw(3 + _lognormal(rng, 9, 0.95, 0, 93), _pixels(rng, _lognormal(rng, 100, 1.3, 2, 1024)), speech)


def longtail(rng: np.random.Generator) -> Raw:
    """Long captions, larger pictures, up to 15 s of sound; 5, 40 and 50 % of the samples lack text, image and audio."""
    while True:
        text, image, audio = rng.random(3) >= (0.05, 0.4, 0.5)
        if text or image or audio:
            return Raw(
                _lognormal(rng, 40, 0.4, 10, 70) if text else 0,
                _pixels(rng, _lognormal(rng, 198, 0.75, 50, 1024)) if image else None,
                _lognormal(rng, 491, 0.75, 100, 1500) if audio else 0,
            )


WORKLOADS = {"stamps": stamps, "longtail": longtail}


def vocabulary(size: int) -> Tokenizer:
    """A tokenizer of `size` ids that nobody trained: ids are drawn, nothing is ever written in letters."""
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(size))][:size]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


@dataclass
class Samples:
    """n samples of a workload as a preset sees them.

    parts    [n, 3], packed tokens of text, image and audio, special tokens included
    lengths  [n], of all three
    """

    config: ModelConfig
    raws: list[Raw]
    seed: int
    parts: np.ndarray = field(init=False)
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.parts = np.array([_packed_tokens(raw, self.config) for raw in self.raws])
        self.lengths = self.parts.sum(axis=1)

    @classmethod
    def draw(cls, workload: str, config: ModelConfig, number: int, seed: int) -> Samples:
        rng = np.random.default_rng(seed)
        return cls(config, [WORKLOADS[workload](rng) for _ in range(number)], seed)

    def batch(self, chosen: Sequence[int], model) -> Batch:
        """Packed, on the host.  What a sample holds depends on (seed, its number) alone."""
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in self.config.modalities}
        items = []
        for i in chosen:
            rows = {}
            for name, feature in self.features(int(i)).items():
                rows[name] = len(arrays[name])
                arrays[name].append(feature)
            items.append(Item(f"s{i}", f"s{i}", "xx", f"s{i}", "train", rows))
        return collate(items, Features.of(arrays), model.front_ends, model.special_tokens)

    def features(self, i: int) -> dict[str, np.ndarray]:
        """What the front ends take of a sample, as their `prepare` would give it."""
        raw, rng = self.raws[i], np.random.default_rng([self.seed, i, 1])
        made: dict[str, np.ndarray] = {}
        if raw.tokens:
            ids = rng.integers(len(SPECIAL_TOKENS), self.config.text.vocab_size, _text_tokens(raw, self.config))
            made["text"] = ids.astype(np.int32)
            made["text"][0] = SPECIAL_TOKENS.index("[CLS]")
        if raw.pixels:
            rows, cols = _grid(raw, self.config)
            made["image"] = rng.integers(0, 256, (3, CELL * rows, CELL * cols), dtype=np.uint8)
        if raw.frames:
            made["audio"] = rng.normal(size=(_frames(raw, self.config), self.config.audio.mels)).astype(np.float16)
        return made


def bucketed(lengths: np.ndarray, batch_size: int, pool: int) -> list[np.ndarray]:
    """Sample numbers of each batch: every `pool` batches are sorted by length together, then cut; 1: as they come."""
    batches = []
    for start in range(0, len(lengths), pool * batch_size):
        order = start + np.argsort(lengths[start : start + pool * batch_size], kind="stable")
        order = order if pool > 1 else np.arange(start, start + len(order))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def spread(batches: list[np.ndarray], number: int) -> list[np.ndarray]:
    """`number` of the batches of a sorted pool, the middle ones of as many equal parts: short and long in their shares.

    Attention is a little less than over the whole pool, whose longest batch is not among them: that favours bucketing.
    """
    if number >= len(batches):
        return batches
    middles = [(part + 0.5) * len(batches) / number - 0.5 for part in range(number)]
    # between two batches, in turns the later and the earlier, so that the sum of places is right
    return [batches[math.floor(m) if part % 2 else math.ceil(m)] for part, m in enumerate(middles)]


def _lognormal(rng: np.random.Generator, median: float, sigma: float, least: int, most: int) -> int:
    return int(np.clip(rng.lognormal(math.log(median), sigma), least, most))


def _pixels(rng: np.random.Generator, cells: int) -> tuple[int, int]:
    aspect = math.exp(rng.normal(0, 0.48))
    side = CELL * math.sqrt(cells)
    return max(1, round(side / math.sqrt(aspect))), max(1, round(side * math.sqrt(aspect)))


def _text_tokens(raw: Raw, config: ModelConfig) -> int:
    return min(raw.tokens, config.text.max_tokens)


def _grid(raw: Raw, config: ModelConfig) -> tuple[int, int]:
    return fit_grid(*raw.pixels, config.image.max_tokens, config.image.enlarge)


def _frames(raw: Raw, config: ModelConfig) -> int:
    return min(raw.frames, int(100 * config.audio.max_seconds))


def _packed_tokens(raw: Raw, config: ModelConfig) -> tuple[int, int, int]:
    image = math.prod(_grid(raw, config)) + 1 if raw.pixels else 0
    audio = -(-_frames(raw, config) // 4) + 1 if raw.frames else 0
    return _text_tokens(raw, config), image, audio

"""Batches to measure on: who sits in a packed batch, drawn from a seed.   B samples, T tokens, M modalities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmkernels.layout import PackedLayout

TEXT, IMAGE, AUDIO = range(3)


def stamps(samples: int, seed: int) -> PackedLayout:
    """Like the `demo` preset on the stamps: a caption, at most 64 image tokens at native aspect, speech for most."""
    rng = np.random.default_rng(seed)
    return _build([_sample(rng, text=(3, 24), side=(3, 8), audio=(20, 80)) for _ in range(samples)])


def native(samples: int, seed: int) -> PackedLayout:
    """Like the `native` preset: up to 1,024 image tokens, so that one sample is many times another."""
    rng = np.random.default_rng(seed)
    return _build([_sample(rng, text=(3, 24), side=(4, 32), audio=(20, 80)) for _ in range(samples)])


def longtail(samples: int, seed: int) -> PackedLayout:
    """Text only, log-normal lengths (median 400, a tail to 8,192): where padding hurts most."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(6.0, 1.0, samples), 16, 8192).astype(int)
    return _build([[(TEXT, int(n))] for n in lengths])


def uniform(samples: int, seed: int, *, length: int = 512) -> PackedLayout:
    """Every sample alike: no padding anywhere, so that only the kernels differ."""
    return _build([[(TEXT, length // 4), (IMAGE, length - length // 4)]] * samples)


def repeats(samples: int, seed: int) -> PackedLayout:
    """Captions cut to 16 tokens, two image sizes, with or without speech of one length: four shapes, in any order."""
    shapes = [[(TEXT, 16), (IMAGE, (side, side)), *speech] for side in (4, 6) for speech in ([], [(AUDIO, 40)])]
    return _build([shapes[i] for i in np.random.default_rng(seed).integers(len(shapes), size=samples)])


BY_NAME: dict[str, Callable[..., PackedLayout]] = {f.__name__: f for f in (stamps, native, longtail, uniform, repeats)}


def _sample(rng: np.random.Generator, text, side, audio) -> list:
    segments = [(TEXT, int(rng.integers(*text)))]
    if rng.random() < 0.9:
        segments.append((IMAGE, (int(rng.integers(*side, endpoint=True)), int(rng.integers(*side, endpoint=True)))))
    if rng.random() < 0.7:
        segments.append((AUDIO, int(rng.integers(*audio))))
    return segments


def _build(samples: list) -> PackedLayout:
    return PackedLayout.from_segments(samples, num_modalities=3)

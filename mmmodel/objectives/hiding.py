"""Which tokens of a segment are hidden.   n tokens."""

from __future__ import annotations

import numpy as np


def draw_hidden(n: int, probability: float, span: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted places, int64 [max(1, round(n probability))], of n; [0] where n is 0.

    span 1: any places are equally likely.  Else runs whose length is geometric with mean `span` are laid anywhere until
    there are enough, and the last is cut (SpanBERT, arXiv 1907.10529, without its limit of ten).
    """
    if n == 0:
        return np.zeros(0, np.int64)
    count = min(n, max(1, round(n * probability)))
    if span <= 1:
        return np.sort(rng.choice(n, size=count, replace=False))
    hidden = np.zeros(n, bool)
    left = count
    while left:
        start, length = rng.integers(n), rng.geometric(1 / span)
        places = np.arange(start, min(n, start + length))
        places = places[~hidden[places]][:left]
        hidden[places] = True
        left -= len(places)
    return np.flatnonzero(hidden)

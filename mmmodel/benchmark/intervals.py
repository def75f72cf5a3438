"""Intervals of a gain in balanced accuracy: a paired bootstrap over concepts.   n samples, C classes, R resamples."""

from __future__ import annotations

import numpy as np


def balanced_accuracy(correct: np.ndarray, classes: np.ndarray) -> float:
    """Mean over the classes of the share of their samples that is correct.  correct [n] in [0, 1], as of many seeds."""
    return float(np.mean([correct[classes == name].mean() for name in np.unique(classes)]))


def balanced_gain(
    before: np.ndarray,
    after: np.ndarray,
    classes: np.ndarray,
    concepts: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of balanced_accuracy(after) - balanced_accuracy(before), drawing concepts with replacement.

    before, after [n] in [0, 1]; both arms get the same draws.  A class that a draw has no sample of does not count in
    it, as it would not in a test set without it.
    """
    _, concept = np.unique(concepts, return_inverse=True)
    names, number = np.unique(classes, return_inverse=True)
    member = np.eye(len(names))[number]  # [n, C]
    count = concept.max() + 1
    draws = np.random.default_rng(seed).integers(0, count, size=(resamples, count))
    times = np.zeros((resamples, count))
    np.add.at(times, (np.arange(resamples)[:, None], draws), 1)
    weight = times[:, concept]  # [R, n]
    size = weight @ member
    gain = (weight * (after - before)) @ member / np.where(size > 0, size, np.nan)
    low, high = np.quantile(np.nanmean(gain, axis=1), [0.025, 0.975])
    return float(low), float(high)

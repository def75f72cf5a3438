"""Retrieval measures: recall at k, its chance level, and a bootstrap over concepts.   Q queries, n gallery items.

Every gallery item of the query's concept is a hit.  All rates are fractions in [0, 1].
"""

from __future__ import annotations

from math import comb

import numpy as np

KS = (1, 5, 10)


def first_hit(scores: np.ndarray, query_concepts: np.ndarray, gallery_concepts: np.ndarray) -> np.ndarray:
    """How many wrong items stand before the best right one, int64 [Q].  scores [Q, n].

    A wrong item with the same score stands before: a model that maps everything to one point finds nothing.
    Raises ValueError if a query has no right item, or a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError("retrieval: scores are not all finite")
    right = query_concepts[:, None] == gallery_concepts[None, :]
    if not right.any(axis=1).all():
        raise ValueError("retrieval: a query has no item of its concept in the gallery")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~right).sum(axis=1)


def recall(ranks: np.ndarray) -> dict[str, float]:
    """{"r1", "r5", "r10"}: share of queries with a right item among the first k."""
    return {f"r{k}": float((ranks < k).mean()) for k in KS}


def chance(query_concepts: np.ndarray, gallery_concepts: np.ndarray) -> dict[str, float]:
    """Recall of a random order: the mean over queries of 1 - C(n - c, k) / C(n, k), c right items among n."""
    n = len(gallery_concepts)
    counts = (query_concepts[:, None] == gallery_concepts[None, :]).sum(axis=1)
    rates = {}
    for k in KS:
        per_count = {c: 1 - comb(n - c, min(k, n)) / comb(n, min(k, n)) for c in set(counts.tolist())}
        rates[f"r{k}"] = float(np.mean([per_count[c] for c in counts.tolist()]))
    return rates


def pooled_chance(parts: list[dict[str, float]], sizes: list[int]) -> dict[str, float]:
    """Chance over several galleries, weighted by their queries."""
    return {key: float(np.average([part[key] for part in parts], weights=sizes)) for key in parts[0]}


def bootstrap_gain(
    before: np.ndarray, after: np.ndarray, concepts: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean(after) - mean(before), drawing concepts with replacement.  before, after 0/1 [Q].

    Concepts, not queries: recordings in three languages of one thing are not three independent facts.
    """
    _, group = np.unique(concepts, return_inverse=True)
    groups = group.max() + 1
    gain = np.bincount(group, weights=after.astype(float) - before.astype(float), minlength=groups)
    size = np.bincount(group, minlength=groups)
    draws = np.random.default_rng(seed).integers(0, groups, size=(resamples, groups))
    gains = gain[draws].sum(axis=1) / size[draws].sum(axis=1)
    low, high = np.quantile(gains, [0.025, 0.975])
    return float(low), float(high)

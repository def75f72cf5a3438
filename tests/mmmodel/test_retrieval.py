"""Retrieval measures on cases small enough to count by hand."""

import numpy as np
import pytest

from mmmodel import retrieval


def test_first_hit_counts_wrong_items_before_the_best_right_one():
    scores = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.3, 0.9]])
    gallery = np.array(["cat", "dog", "dog", "owl"])
    assert retrieval.first_hit(scores, np.array(["dog", "cat"]), gallery).tolist() == [1, 3]


def test_a_tie_counts_against_us():
    same = np.zeros((1, 5))
    assert retrieval.first_hit(same, np.array(["a"]), np.array(["b", "a", "c", "a", "d"])).tolist() == [3]


def test_recall_is_the_share_within_k():
    assert retrieval.recall(np.array([0, 1, 4, 5, 9, 10])) == {"r1": 1 / 6, "r5": 3 / 6, "r10": 5 / 6}


def test_chance_by_hand():
    """One right item of 20: k / 20.  Two of 20, k = 1: 1 / 10; k = 5: 1 - (18 17 16 15 14) / (20 19 18 17 16)."""
    gallery = np.array(["a", "b", "b", *"cdefghijklmnopqrs"])
    assert retrieval.chance(np.array(["a"]), gallery) == pytest.approx({"r1": 1 / 20, "r5": 5 / 20, "r10": 10 / 20})
    two = retrieval.chance(np.array(["b"]), gallery)
    assert two["r1"] == pytest.approx(2 / 20)
    assert two["r5"] == pytest.approx(1 - (15 * 14) / (20 * 19))
    mean = retrieval.chance(np.array(["a", "b"]), gallery)
    assert mean["r1"] == pytest.approx((1 / 20 + 2 / 20) / 2)


def test_chance_is_what_random_orders_give():
    rng = np.random.default_rng(0)
    gallery = rng.integers(0, 12, 30)
    ranks = np.concatenate([retrieval.first_hit(rng.random((30, 30)), gallery, gallery) for _ in range(300)])
    expected = retrieval.chance(gallery, gallery)
    assert retrieval.recall(ranks) == pytest.approx(expected, abs=0.02)  # 9,000 draws: three deviations


def test_a_gallery_smaller_than_k_is_always_found():
    assert retrieval.chance(np.array(["a"]), np.array(["a", "b"]))["r10"] == 1.0


def test_bootstrap_draws_concepts_not_queries():
    """All queries of one concept: no other draw is possible, so the interval is a point."""
    before, after = np.zeros(6), np.array([1, 1, 1, 0, 0, 0])
    assert retrieval.bootstrap_gain(before, after, np.array(["a"] * 6)) == (0.5, 0.5)
    # Two concepts, one gaining fully: a resample has 0, 1 or 2 of it, so the 95 % interval is the whole range.
    assert retrieval.bootstrap_gain(before, after, np.array(["a"] * 3 + ["b"] * 3)) == (0.0, 1.0)


def test_bootstrap_width_matches_theory():
    """400 concepts of one query with gain p = 0.3: half width 1.96 sqrt(p (1 - p) / n) = 0.045."""
    after = (np.arange(400) % 10 < 3).astype(float)
    low, high = retrieval.bootstrap_gain(np.zeros(400), after, np.arange(400))
    assert (low, high) == pytest.approx((0.3 - 0.045, 0.3 + 0.045), abs=0.01)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no item of its concept"):
        retrieval.first_hit(np.zeros((1, 2)), np.array(["a"]), np.array(["b", "c"]))
    with pytest.raises(ValueError, match="not all finite"):
        retrieval.first_hit(np.array([[np.nan, 0]]), np.array(["a"]), np.array(["a", "b"]))

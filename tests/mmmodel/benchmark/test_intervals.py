"""Balanced accuracy and the interval of its gain, by hand and against theory."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from mmmodel.benchmark.intervals import balanced_accuracy, balanced_gain


def test_balanced_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth, found = rng.choice(list("aaab"), 60), rng.choice(list("ab"), 60)
    assert balanced_accuracy(truth == found, truth) == pytest.approx(balanced_accuracy_score(truth, found))


def test_the_same_answers_gain_nothing():
    correct, classes = np.array([1.0, 0, 1, 0]), np.array(list("aabb"))
    assert balanced_gain(correct, correct, classes, np.arange(4)) == (0.0, 0.0)


def test_concepts_are_drawn_whole_and_classes_weigh_the_same():
    """Class a: one concept of three samples, gained; class b: one of one, not.  A draw has a alone (gain 1), b alone
    (0) or both (1/2), so the 95 % interval is all of it; by samples it would be narrower."""
    classes, concepts = np.array(list("aaab")), np.array(list("xxxy"))
    before, after = np.zeros(4), np.array([1.0, 1, 1, 0])
    assert balanced_gain(before, after, classes, concepts) == (0.0, 1.0)


def test_width_matches_theory():
    """Two classes of 500 concepts with gain p = 0.3: a share has variance p (1 - p) / 500, their mean half of it."""
    classes = np.repeat(["a", "b"], 500)
    after = (np.arange(1000) % 10 < 3).astype(float)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    low, high = balanced_gain(np.zeros(1000), after, classes, np.arange(1000))
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.006)

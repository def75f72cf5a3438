"""Scores of fine-tuned models against their definitions, written out."""

import math

import numpy as np
import pytest
import torch

from mmmodel.finetuning import labels, scores


def average_precision(truth, found):
    """Mean over the true samples of the precision at their score; ties stand at one threshold."""
    at = [truth[found >= threshold].mean() for threshold in found[truth]]
    return float(np.mean(at))


@pytest.mark.parametrize("count", [1, 3])  # of one label scikit-learn alone would take 0 and 1 for two classes
def test_multilabel_by_hand(count):
    names = "abc"[:count]
    rng = np.random.default_rng(0)
    truth = rng.random((40, count)) < 0.3
    values = [tuple(name for name, has in zip(names, row, strict=True) if has) for row in truth]
    outputs = torch.from_numpy(np.round(rng.normal(size=(40, count)), 1)).float()  # rounded: some are equal
    found = scores.score(labels.fit(values, "multilabel"), outputs, values)

    likely = outputs.numpy() >= 0
    right, wrong = (likely & truth).sum(), (likely != truth).sum()
    assert found["micro_f1"] == pytest.approx(2 * right / (2 * right + wrong))
    expected = [average_precision(truth[:, i], outputs[:, i].numpy()) for i in range(count)]
    assert found["mean_average_precision"] == pytest.approx(np.mean(expected))


def test_a_label_that_no_training_sample_has_counts_as_wrong():
    rule = labels.fit([("a",), ()], "multilabel")
    outputs = torch.tensor([[3.0], [-3.0], [-3.0]])
    known = scores.score(rule, outputs, [("a",), (), ()])
    assert known == {"mean_average_precision": 1.0, "micro_f1": 1.0}
    other = scores.score(rule, outputs, [("a",), ("new",), ()])
    assert other["micro_f1"] == pytest.approx(2 / 3)  # one found of two
    assert other["mean_average_precision"] == pytest.approx((1 + 1 / 3) / 2)  # all samples are equal for it


def test_what_has_no_score_has_none():
    rule = labels.fit([("a",), ()], "multilabel")
    for same in ((), ("a",)):  # of samples that are alike no order is the right one
        assert math.isnan(scores.score(rule, torch.zeros(2, 1), [same, same])["mean_average_precision"])
    number = labels.fit([1.0, 3.0], "regression")
    for count in (1, 3):
        assert math.isnan(scores.score(number, torch.zeros(count, 1), [2.0] * count)["r2"])


def test_numbers_that_fp32_cannot_tell_apart():
    """Times in seconds: fp32 has steps of 128 there."""
    values = [1.7e9 + i for i in range(50)]
    rule = labels.fit(values, "regression")
    targets = rule.encode(values)
    assert targets.dtype == torch.float32
    assert len(targets.unique()) == 50
    assert scores.score(rule, targets, values)["rmse"] < 1e-3

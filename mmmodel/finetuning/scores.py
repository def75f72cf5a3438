"""Validation and test scores of each task, by scikit-learn, and the one by which runs are compared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics
from torch import Tensor

from mmmodel import evaluate, retrieval
from mmmodel.configs import ConfigError
from mmmodel.features import Item
from mmmodel.finetuning.labels import Labels

# More is better for each.
MAIN = {
    "classification": "balanced_accuracy",
    "qa": "accuracy",
    "multilabel": "mean_average_precision",
    "regression": "r2",
    "retrieval": "r10",
}


def score(labels: Labels, outputs: Tensor, values: Sequence[Any]) -> dict[str, float]:
    """outputs [B, C] for samples whose labels are `values`.  A label that the model has no output for counts as wrong.

    classification, qa: accuracy, balanced_accuracy, macro_f1.  multilabel: mean_average_precision over the labels that
    some samples have and others lack, NaN if there is none; micro_f1 at probability 0.5.  regression, in the label's
    unit: mae, rmse, and r2, NaN where all samples have one number.
    """
    outputs = outputs.double()
    if labels.task == "multilabel":
        return _multilabel(labels, labels.scores(outputs).numpy(), values)
    if labels.task == "regression":
        found = labels.scores(outputs)[:, 0].numpy()
        truth = np.asarray(values, np.float64)
        return {
            "mae": float(metrics.mean_absolute_error(truth, found)),
            "rmse": float(metrics.root_mean_squared_error(truth, found)),
            "r2": float(metrics.r2_score(truth, found)) if np.ptp(truth) else math.nan,
        }
    truth = np.asarray(values)
    found = np.asarray(labels.classes)[outputs.argmax(dim=1).numpy()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")  # as it should be able to
        return {
            "accuracy": float(metrics.accuracy_score(truth, found)),
            "balanced_accuracy": float(metrics.balanced_accuracy_score(truth, found)),
            "macro_f1": float(metrics.f1_score(truth, found, average="macro", zero_division=0)),
        }


def _multilabel(labels: Labels, found: np.ndarray, values: Sequence[Any]) -> dict[str, float]:
    """found [B, C]."""
    names = [*labels.classes, *sorted({name for value in values for name in value} - set(labels.classes))]
    truth = np.array([[name in value for name in names] for value in values])
    found = np.pad(found, ((0, 0), (0, len(names) - found.shape[1])))  # what no training sample has: never predicted
    # No order of samples is right or wrong about a label that none of them has, or all.
    compared = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0))
    # Label by label and flat: of a table with one column scikit-learn takes 0 and 1 for two classes.
    precisions = [metrics.average_precision_score(truth[:, i], found[:, i]) for i in compared]
    return {
        "mean_average_precision": float(np.mean(precisions)) if precisions else math.nan,
        "micro_f1": float(metrics.f1_score(truth.ravel(), found.ravel() >= 0.5, zero_division=0)),
    }


def score_retrieval(points: dict[str, np.ndarray], items: Sequence[Item]) -> dict[str, float]:
    """Recall at 1, 5 and 10, the mean over every ordered pair of modalities and language that can be asked.

    Raises ConfigError if no pair can be.
    """
    outcomes = evaluate.ranks(points, items, evaluate.all_pairs(points))
    if not outcomes:
        labels = len({item.concept for item in items})
        raise ConfigError(
            f"finetune: {len(items)} samples of {labels} labels have nothing to retrieve, expected two labels or more "
            f"that have the same two modalities in one language"
        )
    rates = [retrieval.recall(outcome.before_hit) for outcome in outcomes.values()]
    return {key: float(np.mean([rate[key] for rate in rates])) for key in rates[0]}

"""Labels from KEY.json: what each sample is to be given, checked, and as tensors.   B samples, C outputs."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmmodel.configs import ConfigError
from mmmodel.data.shards import Entry
from mmmodel.features import Item

UNSEEN = -1  # class of a label that no training sample has; the model cannot be right about it


@dataclass(frozen=True)
class Labels:
    """How a label becomes a target: the classes in order of output, or the scale of a number."""

    task: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def outputs(self) -> int:
        return len(self.classes) or 1

    def encode(self, values: Sequence[Any]) -> Tensor:
        """classification, qa: int64 [B], UNSEEN for a label that has no output.  multilabel: float32 [B, C] of 0 and 1.
        regression: float32 [B, 1], mean 0 and deviation 1 over the training samples."""
        number = {name: i for i, name in enumerate(self.classes)}
        if self.task == "multilabel":
            target = torch.zeros(len(values), len(self.classes))
            for row, names in enumerate(values):
                target[row, [number[name] for name in names if name in number]] = 1.0
            return target
        if self.task == "regression":
            exact = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
            return ((exact - self.mean) / self.deviation).float()
        return torch.tensor([number.get(value, UNSEEN) for value in values], dtype=torch.int64)

    def scores(self, outputs: Tensor) -> Tensor:
        """What the model's outputs [B, C] say.  classification, qa: probabilities that add up to 1.  multilabel: the
        probability of each label.  regression: the number, in the label's unit, in fp64."""
        if self.task == "multilabel":
            return outputs.sigmoid()
        if self.task == "regression":
            return outputs.double() * self.deviation + self.mean  # fp32 knows a time in seconds to 128 s
        return outputs.softmax(dim=-1)


def read(
    items: Sequence[Item | Entry], metas: Mapping[str, Mapping[str, Any]], task: str, field: str
) -> dict[str, Any]:
    """key -> label of each item that has one; metas: key -> KEY.json.

    A blank text is none.  classification, qa, retrieval: str.  multilabel: tuple of str.  regression: float.  Raises
    ConfigError if no item has the field, naming the fields there are, and for a label that is not of the task's kind,
    naming the sample.
    """
    labels = {}
    for item in items:
        value = metas[item.key].get(field)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            labels[item.key] = _checked(value, task, field, item.key)
    if not labels:
        fields = sorted({name for item in items for name in metas[item.key]})
        raise ConfigError(f"finetune: no sample has a label {field!r}; their fields are {', '.join(fields) or 'none'}")
    return labels


def fit(values: Sequence[Any], task: str) -> Labels:
    """What the training labels `values` say about the outputs.  Raises ConfigError for labels with nothing to learn."""
    if not values:
        raise ConfigError("finetune: there are 0 training labels, expected at least 2 that differ")
    if len({frozenset(value) if task == "multilabel" else value for value in values}) < 2:
        shown = ", ".join(values[0]) or "empty" if task == "multilabel" else values[0]
        raise ConfigError(f"finetune: all {len(values)} training labels are {shown}, nothing to learn")
    if task == "retrieval":
        return Labels(task)
    if task == "regression":
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation = float(np.mean(values)), float(np.std(values))
        if not 0 < deviation < math.inf:
            raise ConfigError(
                f"finetune: the training labels go from {min(values):g} to {max(values):g}, and their deviation is "
                f"{deviation:g}, expected one that is finite and above 0; scale them"
            )
        return Labels(task, mean=mean, deviation=deviation)
    return Labels(task, classes=tuple(sorted({name for value in values for name in _names(value)})))


def unseen(values: Sequence[Any], labels: Labels) -> list[str]:
    """For each of `values` with a name that has no output, because no training sample has it, that name."""
    if not labels.classes:
        return []
    lacking = ([name for name in _names(value) if name not in labels.classes] for value in values)
    return [names[0] for names in lacking if names]


def few(items: Sequence[Item], labels: Mapping[str, str], per_class: int, seed: int) -> list[Item]:
    """At most per_class items of each class, drawn by seed, in their order; classes with fewer keep all."""
    rng = np.random.default_rng([seed, 3])
    left = Counter()
    kept = set()
    for i in rng.permutation(len(items)):
        name = labels[items[i].key]
        if left[name] < per_class:
            left[name] += 1
            kept.add(int(i))
    return [item for i, item in enumerate(items) if i in kept]


def first_of_groups(items: Sequence[Item]) -> list[Item]:
    """One item per group: the same picture in several languages counts once."""
    seen: set[str] = set()
    return [item for item in items if not (item.group in seen or seen.add(item.group))]


def limited_to(items: Sequence[Item], modalities: Sequence[str]) -> list[Item]:
    """Items that show only these modalities; those with none of them go."""
    limited = [replace(item, rows={n: r for n, r in item.rows.items() if n in modalities}) for item in items]
    return [item for item in limited if item.rows]


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _checked(value: Any, task: str, field: str, key: str) -> Any:
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"finetune: label {field!r} of {key} is {value!r}, expected {expected}")

    if task == "multilabel":
        if not isinstance(value, list) or not all(isinstance(name, str | int) for name in value):
            raise wrong('a list of names, such as ["a", "b"] (in a cell of csv too)')
        return tuple(str(name) for name in value)
    if task == "regression":
        number = _as_number(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise wrong("a number")
        if not abs(number) <= sys.float_info.max:  # nor an int that no float holds, which math.isfinite chokes on
            raise wrong("a number that is finite and that a float holds")
        return float(number)
    if not isinstance(value, str | int):
        raise wrong("a name or a whole number")
    return str(value)


def _as_number(text: str) -> float | None:
    """What a column of a table holds as text, all of it, because one cell is no number: that cell is to be named."""
    try:
        return float(json.loads(text))  # as tables are read: float() alone would take 1_000 for 1000
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None

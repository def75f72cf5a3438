"""Arguments that several drop-ins take, checked alike."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from mmkernels.masks import FAR

FALLBACKS = (None, "torch")


def refuse_tensors(caller: str, scale: tuple[str, object], dropout: tuple[str, object]) -> None:
    """Their gradients would be lost.   scale, dropout: each by the name that the drop-in gives it"""
    name, value = scale
    if isinstance(value, Tensor):
        raise ValueError(
            f"{caller}: {name} is a tensor, expected a number; multiply the queries by it and give {name}=1.0"
        )
    name, value = dropout
    if isinstance(value, Tensor):
        raise ValueError(f"{caller}: {name} is a tensor, expected a number")


def window(caller: str, name: str, value) -> tuple[int, int]:
    """(left, right), where every negative side is -1: unlimited."""
    try:
        left, right = map(index, value)
    except (TypeError, ValueError):  # no sequence, not whole, or not two
        raise ValueError(f"{caller}: {name} is {value!r}, expected (left, right) as integers") from None
    return max(-1, min(left, FAR)), max(-1, min(right, FAR))


def is_whole(t: Tensor) -> bool:
    return not (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool)

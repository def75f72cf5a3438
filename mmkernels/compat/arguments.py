"""Arguments that several drop-ins take, checked alike."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from mmkernels.arguments import is_number, zero_or_one
from mmkernels.masks import FAR

FALLBACKS = (None, "torch")


def check_numbers(caller: str, scale: tuple[str, object], dropout: tuple[str, object]) -> None:
    """ValueError for what is no number; of a tensor the gradient would be lost.

    scale, dropout: each by the name that the drop-in gives it; a scale may be None, dropout False
    """
    (scale_name, value), (dropout_name, dropped) = scale, dropout
    if isinstance(value, Tensor):
        raise ValueError(
            f"{caller}: {scale_name} is a tensor, expected a number; multiply the queries by it and give "
            f"{scale_name}=1.0"
        )
    given_dropout = 0.0 if dropped is False else dropped
    for name, given in ((scale_name, 1.0 if value is None else value), (dropout_name, given_dropout)):
        if not is_number(given):
            kind = "a tensor" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{caller}: {name} is {kind}, expected a number")


def flag(caller: str, name: str, value) -> bool:
    """True, False, 0 or 1 as a bool; ValueError for anything else, such as "False"."""
    found = zero_or_one(value)
    if found is None:
        raise ValueError(f"{caller}: {name} is {value!r}, expected a bool")
    return found


def window(caller: str, name: str, value) -> tuple[int, int]:
    """(left, right), where every negative side is -1: unlimited."""
    try:
        left, right = map(index, value)
    except (TypeError, ValueError):  # no sequence, not whole, or not two
        raise ValueError(f"{caller}: {name} is {value!r}, expected (left, right) as integers") from None
    return max(-1, min(left, FAR)), max(-1, min(right, FAR))


def is_whole(t: Tensor) -> bool:
    return not (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool)

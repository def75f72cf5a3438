"""What callers pass, checked alike: numbers, fractions, lists, and arrays on the host."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from operator import index

import numpy as np
import torch

# What an option that is a number may be: in a graph of torch.compile also a symbol.
WHOLE = (int, np.integer, torch.SymInt)
NUMBERS = (*WHOLE, float, np.floating, torch.SymFloat)
LARGEST = sys.float_info.max  # finite, as a float: compared with, since torch.compile has no isfinite for symbols

KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*KERNEL_FLOATS, torch.float64)  # the last by references, and in the sums of packing
FLOAT_NAMES = "float32, bfloat16, float16 or float64"


def is_number(value, kinds: tuple[type, ...] = NUMBERS) -> bool:
    # The first answers for int and float, in a third of the time.
    return type(value) in kinds or (isinstance(value, kinds) and not isinstance(value, bool))


def is_finite(value) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    if isinstance(value, np.floating):
        value = float(value)  # numpy would compare with the bound in the value's own width, where it is infinite
    return is_number(value) and -LARGEST <= value <= LARGEST


def is_dropout(value) -> bool:
    """Whether it is a fraction of elements that may be dropped; False, which `training and p` gives, is 0."""
    return value is False or (is_number(value) and 0.0 <= value < 1.0)


def zero_or_one(value) -> bool | None:
    """None for anything but True, False, 0 and 1."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    try:
        return bool(value) if index(value) in (0, 1) else None
    except TypeError:
        return None


def one_of(function: str, name: str, value, choices: Iterable) -> None:
    """ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{function}: {name} is {value!r}, expected one of {', '.join(map(str, choices))}")


def at_least_one(function: str, name: str, value, rest: str = "") -> int:
    """The whole number; ValueError for what is none, or less than 1."""
    try:
        if not isinstance(value, bool) and index(value) >= 1:  # never rounds 2.5 to 2
            return index(value)
    except TypeError:
        pass
    raise ValueError(f"{function}: {name} is {value!r}, expected a whole number of at least 1{rest}")


def as_list(function: str, name: str, given, expected: str) -> list:
    """Whatever can be gone through, once; ValueError for what cannot."""
    try:
        return list(given)
    except TypeError:
        raise ValueError(f"{function}: {name} is {type(given).__name__}, expected {expected}") from None


def host_array(function: str, name: str, values, kinds: str = "iu") -> np.ndarray:
    """values as an array whose dtype is of one of numpy's kinds.  Nothing is copied from a device."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list; a tensor on a device, or with a gradient
        if odd := _odd_row(values):
            raise ValueError(
                f"{function}: {name}[{odd}] has {len(values[odd])} entries, expected {len(values[0])} as {name}[0]"
            ) from None
        raise ValueError(f"{function}: {name} is no array of numbers on the host: {error}") from error
    if array.size and array.dtype.kind not in kinds:
        raise ValueError(f"{function}: {name} is {array.dtype}, expected {'numbers' if 'f' in kinds else 'integers'}")
    return array


def numbers(function: str, name: str, tensor: torch.Tensor) -> np.ndarray:
    """What a tensor on the CPU holds, also where memory holds the negatives, or zeros lie nowhere."""
    if hasattr(tensor, "fake_mode"):  # in whose memory there is nothing
        raise ValueError(f"{function}: {name} is a fake tensor, expected one with numbers")
    return tensor.numpy(force=True)


def _odd_row(values) -> int:
    """The first row of a list of lists that is of another length than row 0; 0 where there is none."""
    if not isinstance(values, list | tuple) or not all(isinstance(row, list | tuple) for row in values):
        return 0
    return next((i for i, row in enumerate(values) if len(row) != len(values[0])), 0)

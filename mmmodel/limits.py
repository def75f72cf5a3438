"""The kinds of values that fields of a configuration take, the one function that checks them, and mmmodel's errors.

A field says its kind by its annotation: `steps: Count = 480`, `schedule: Literal["cosine", "wsd"] = "cosine"`.
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write, which names no file
MISSING = 'mmmodel: %s is not there; pip install ".[model]" in a checkout brings what mmmodel needs'


class ConfigError(ValueError):
    """A configuration that cannot be: the command line prints it as one line."""


class CheckpointError(ConfigError):
    """A file that is no checkpoint, is damaged, or does not fit the model."""


class RunError(RuntimeError):
    """A run that cannot go on for what it was asked to do: the command line prints it as one line."""


@dataclass(frozen=True)
class Range:
    """Finite numbers from low to high, both included unless `above` or `below` says otherwise."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (self.low < value or (self.low == value and not self.above)) and (
            value < self.high or (value == self.high and not self.below)
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'more than' if self.above else 'at least'} {self.low:g}"
        return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


class Names:
    """At least one name, none of them twice."""

    def has(self, value: Any) -> bool:
        return len(value) > 0 and len(set(value)) == len(value)

    def __str__(self) -> str:
        return "one or more names, each once"


class DeviceName:
    def has(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None

    def __str__(self) -> str:
        return "cpu, cuda or cuda:NUMBER"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]  # 0 mostly means: off
Seed = Annotated[int, Range(0, 2**63, below=True)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
SomeShare = Annotated[float, Range(0, 1, above=True)]
LearningRate = SomeShare
Device = Annotated[str, DeviceName()]


def check(config: Any, who: str, inside: str = "", fields: Collection[str] = ()) -> None:
    """Raises ConfigError for the first field of a configuration, or of one inside it, that is not of its kind.

    who and inside: what the message has in front, and in front of the field.  fields: those to check; empty: all.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        if fields and name not in fields:
            continue
        value = getattr(config, name)
        if is_dataclass(value):
            check(value, who, f"{inside}{name}.")
        elif (expected := _expected(value, kind)) is not None:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(f"{who}: {inside}{name} is {shown!r}, expected {expected}")


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first of many names, for a line that a person reads."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def check_device(name: str, who: str) -> None:
    """Raises ConfigError for a device that torch does not have here."""
    if (expected := _expected(name, Device)) is not None:
        raise ConfigError(f"{who}: device is {name!r}, expected {expected}")
    if name == "cpu":
        return
    import torch  # not above: --help answers without it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(f"{who}: device is {name!r}, expected cpu: torch {torch.__version__} sees no GPU here")
    if int(name.partition(":")[2] or 0) >= count:
        raise ConfigError(f"{who}: device is {name!r}, expected a number below {count}, the GPUs that torch sees")


def _expected(value: Any, kind: Any) -> str | None:
    """What a field of this kind takes, in words, if `value` is no such thing; else None."""
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):  # letters would pass for names
            return "a tuple"
        inner = get_args(kind)
        if inner[-1] is not ... and len(value) != len(inner):
            return f"{len(inner)} values"
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        wrong = (_expected(part, kind) for part, kind in zip(value, kinds, strict=True))
        return next((f"each to be {words}" for words in wrong if words is not None), None)
    if get_origin(kind) is Annotated:
        base, *rules = get_args(kind)
        if (expected := _expected(value, base)) is not None:
            return expected
        if base is int and not isinstance(value, int):
            return "a whole number"
        finite = ", and finite" if isinstance(value, float) and math.isinf(value) else ""
        return next((f"{rule}{finite}" for rule in rules if not rule.has(value)), None)
    return None

"""The one reader of environment variables in mmkernels."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    triton_interpret  TRITON_INTERPRET=1: Triton kernels run in the interpreter, on CPU tensors.
    """

    triton_interpret: bool


def _flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "off")


def current() -> Settings:
    """The settings as they are now; read afresh, so that tests can change the environment."""
    return Settings(triton_interpret=_flag("TRITON_INTERPRET"))

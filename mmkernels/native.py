"""The native modules: which there are, where they lie, and how the CPU operators are loaded."""

from __future__ import annotations

import functools
import importlib.machinery
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
MODULES = {"_planner": "layouts, attention tiles and packs", "_C": "CPU operators"}


def path_of(name: str) -> Path | None:
    """The file of a native module in this package, or None where it is not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = PACKAGE / f"{name}{suffix}"
        if path.exists():
            return path
    return None


@functools.cache
def load_cpu_ops() -> None:
    """Registers the implementations of torch.ops.mm_cpp.*; their schemas are in the operators' cpp_impl.py.

    `_C` is a plain library: it does not use Python's API, so it builds without Python's headers.
    """
    path = path_of("_C")
    if path is None:
        raise ImportError("the extension mmkernels._C is not built (run: python -m mmkernels.build)")
    torch.ops.load_library(str(path))

"""The native modules: which there are, where they lie, and how the operators are loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).resolve().parent
MODULES = {"_planner": "layouts, attention tiles and packs", "_C": "CPU operators", "_C_cuda": "CUDA operators"}
IN_CHECKOUT = (PACKAGE.parent / "setup.py").exists()  # an installed package has no sources beside it
HOW_TO_BUILD = (
    "run: python -m mmkernels.build"
    if IN_CHECKOUT
    else "with a C++20 compiler, in a checkout: pip install --no-build-isolation ."
)


def path_of(name: str) -> Path | None:
    """The file of a native module in this package, or None where it is not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = PACKAGE / f"{name}{suffix}"
        if path.exists():
            return path
    return None


def needless(name: str) -> str | None:
    """Why a module is not meant for this machine, or None."""
    if name == "_C_cuda" and torch.version.cuda is None:
        return "torch is a CPU build"
    return None


def load_cpu_ops() -> None:
    """Registers the implementations of torch.ops.mm_cpp.*; their schemas are in the operators' folders."""
    _load("_C")


def cpu_functions() -> ModuleType | None:
    """The functions that Python calls without the dispatcher, or None where `_C` was built without Python's headers."""
    load_cpu_ops()
    try:
        return importlib.import_module("mmkernels._C")
    except ImportError:
        return None


def load_cuda_ops() -> None:
    """Registers the implementations of torch.ops.mm_cuda.*."""
    _load("_C_cuda")


@functools.cache
def _load(name: str) -> None:
    # As plain libraries: their operators need nothing of Python, not even its headers at build time.
    path = path_of(name)
    if path is None:
        raise ImportError(f"the extension mmkernels.{name} is not built ({HOW_TO_BUILD})")
    torch.ops.load_library(str(path))

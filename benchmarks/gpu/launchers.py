"""Triton's launchers, C modules that take a second each to compile, made without a GPU or a driver.

They are linked against a stand-in for libcuda.so.1 that has the names which they take from it; where there is a driver
the loader finds the real one by the same name.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from triton.backends.nvidia import driver
from triton.runtime.build import compile_module_from_src

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE: what the stand-in answers to everything


def build(source: Any, metadata: Any) -> None:
    """Leaves the launcher of a kernel in Triton's cache, as triton.backends.nvidia.driver.CudaLauncher would."""
    if shutil.which("gcc") is None:
        return
    place = {name: (index,) for index, name in enumerate(source.fn.arg_names)}
    constants = {place.get(key, key): value for key, value in getattr(source, "constants", {}).items()}
    text = driver.make_launcher(constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None))
    _compiled(text, "__triton_launcher")


def build_utils() -> None:
    """The module that loads kernels, one for all."""
    if shutil.which("gcc") is not None:
        _compiled(_source_of_utils(), "cuda_utils")


@functools.cache
def _compiled(text: str, name: str) -> None:
    options = {"include_dirs": driver.include_dirs, "libraries": driver.libraries}
    compile_module_from_src(text, name, library_dirs=[driver.libdevice_dir, str(_stand_in())], **options)


@functools.cache
def _stand_in() -> Path:
    """The folder of a libcuda.so.1 that is loaded into this process, so that what is linked against it can be."""
    folder = Path(tempfile.mkdtemp())
    used = Path(driver.__file__).read_text() + _source_of_utils()
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", used)))
    (folder / "cuda.c").write_text("\n".join(f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in names))
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(folder / "cuda.c")]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))
    return folder


def _source_of_utils() -> str:
    return (Path(driver.__file__).parent / "driver.c").read_text()

"""Native modules of mmkernels; everything else is in pyproject.toml.

`mmkernels._planner`: host-side planning, pybind11 and numpy, no torch.
`mmkernels._C`: CPU operators on torch's stable ABI; a plain library that mmkernels/native.py loads.
Both are optional: without a compiler, pybind11 or torch the install goes on in pure Python and says what is missing.
MMKERNELS_SKIP_NATIVE=1 leaves them out.
"""

import contextlib
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CFLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]  # wider vectors are chosen at run time


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.cpp"))


def headers(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.h"))


def planner_extension() -> Extension:
    import pybind11

    return Extension(
        "mmkernels._planner",
        sources("planner"),
        depends=["setup.py", *headers("planner")],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*CFLAGS, "-ffp-contract=off"],  # the same plan on every platform
        optional=True,
    )


def cpu_extension() -> Extension:
    import torch.utils.cpp_extension as torch_build

    return Extension(
        "mmkernels._C",
        sources("cpu", "bindings"),
        depends=["setup.py", *headers("cpu", "bindings")],
        include_dirs=["csrc"],
        library_dirs=torch_build.library_paths(),
        libraries=["torch_cpu"],
        # 0x020b...: only the ABI of torch 2.11, so that one binary serves every later torch
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        # -isystem: its headers warn
        extra_compile_args=[*CFLAGS, *(f"-isystem{path}" for path in torch_build.include_paths())],
        py_limited_api=True,
        language="c++",
        optional=True,
    )


def extensions() -> list[Extension]:
    if os.environ.get("MMKERNELS_SKIP_NATIVE") == "1":  # `make setup` builds them in a step of its own
        return []
    found = []
    for name, make in (("_planner", planner_extension), ("_C", cpu_extension)):
        try:
            found.append(make())
        except ImportError as error:
            print(f"mmkernels.{name} is left out: {error}. Install it and run `python -m mmkernels.build`.")
    return found


class OptionalBuild(build_ext):
    """Builds what can be built, compiling files in parallel, and says which module was left out and why."""

    def run(self):
        with parallel_compile():
            super().run()
        for extension in self.extensions:
            if not Path(self.get_ext_fullpath(extension.name)).exists():
                print(
                    f"{extension.name} was not built (the compiler's message is above); mmkernels works without it, "
                    "slower. With a C++20 compiler, run `python -m mmkernels.build`."
                )


def parallel_compile():
    try:
        from pybind11.setup_helpers import ParallelCompile
    except ImportError:
        return contextlib.nullcontext()
    return ParallelCompile(default=os.cpu_count() or 1)


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})

"""Native modules of mmkernels; everything else is in pyproject.toml.

`mmkernels._planner`: host-side planning, pybind11 and numpy, no torch.
`mmkernels._C`: CPU operators on torch's stable ABI, which mmkernels/native.py loads as a plain library; with Python's
headers at hand also a module of Python's limited API, for packing calls that go past torch's dispatcher.
`mmkernels._C_cuda`: CUDA operators, the same way, compiled by nvcc where torch is a CUDA build.
All are optional: without a compiler, pybind11 or torch the install goes on in pure Python and says what is missing.
MMKERNELS_SKIP_NATIVE=1 leaves them out; MMKERNELS_SANITIZE=1 builds the C++ with ASan and UBSan (tests/sanitize.py);
MMKERNELS_X86_LEVEL=4 (AVX-512, no products of bf16), 3 (AVX2) or 1 with nothing wider (tests/vector_widths.py).
"""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CFLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]  # wider vectors are chosen at run time
# For tests: nothing wider than x86-64-v4 (AVX-512), v3 (AVX2) or v1, whatever the CPU has.
if "MMKERNELS_X86_LEVEL" in os.environ:
    CFLAGS.append(f"-DMM_X86_LEVEL={int(os.environ['MMKERNELS_X86_LEVEL'])}")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
if os.environ.get("MMKERNELS_SANITIZE") == "1":
    CFLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]
    LINK_FLAGS = SANITIZE
else:
    LINK_FLAGS = []
# 0x020b...: only the ABI of torch 2.11, so that one binary serves every later torch
TORCH_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")
# GPUs with code of their own; sm_100 needs CUDA 12.8.  Later ones compile the last one's PTX when they load it.
CUDA_ARCHITECTURES = ((80, (0, 0)), (90, (0, 0)), (100, (12, 8)))


def sources(*folders: str, cuda: bool = False) -> list[str]:
    """The C++ files of these folders, and the CUDA bindings only where asked for."""
    found = (path for folder in folders for path in Path("csrc", folder).glob("*.cpp"))
    return sorted(str(path) for path in found if path.stem.endswith("_cuda") == cuda)


def headers(*folders: str) -> list[str]:
    return sorted(
        str(path) for folder in folders for path in Path("csrc", folder).glob("*.[hc]*") if path.suffix != ".cpp"
    )


def planner_extension() -> Extension:
    import pybind11

    return Extension(
        "mmkernels._planner",
        sources("planner"),
        depends=["setup.py", *headers("planner")],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*CFLAGS, "-ffp-contract=off"],  # the same plan on every platform
        extra_link_args=LINK_FLAGS,
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
        define_macros=[TORCH_ABI],
        # -isystem: its headers warn
        extra_compile_args=[*CFLAGS, *(f"-isystem{path}" for path in torch_build.include_paths())],
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
        language="c++",
        optional=True,
    )


def cuda_extension() -> Extension:
    import torch
    import torch.utils.cpp_extension as torch_build

    if torch.version.cuda is None:
        raise ImportError("torch is a CPU build")
    nvcc, version = find_nvcc()
    if torch.version.cuda.split(".")[0] != str(version[0]):
        raise ImportError(f"nvcc is of CUDA {version[0]}, torch of CUDA {torch.version.cuda}")
    extension = Extension(
        "mmkernels._C_cuda",
        [*sources("bindings", cuda=True), *sorted(str(path) for path in Path("csrc/kernels").glob("*.cu"))],
        depends=["setup.py", *headers("kernels", "bindings")],
        py_limited_api=True,
        optional=True,
    )
    known = [arch for arch, needs in CUDA_ARCHITECTURES if version >= needs]
    extension.nvcc_command = [
        nvcc,
        *("-shared", "-std=c++20", "-O3", "--threads=0", "-cudart=shared", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known),
        f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}",
        *("-Icsrc", "-DUSE_CUDA", f"-D{TORCH_ABI[0]}={TORCH_ABI[1]}"),
        *(f"-isystem={path}" for path in torch_build.include_paths()),
        *extension.sources,
        *(f"-L{path}" for path in torch_build.library_paths()),
        *("-ltorch_cpu", "-ltorch_cuda"),
    ]
    return extension


def find_nvcc() -> tuple[str, tuple[int, int]]:
    """(path, version) of CUDA's compiler.  Raises ImportError where there is none."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = [str(home / "bin/nvcc") for home in homes if (home / "bin/nvcc").exists()]
    nvcc = found[0] if os.environ.get("CUDA_HOME") and found else shutil.which("nvcc") or next(iter(found), None)
    if nvcc is None:
        raise ImportError("nvcc is neither on PATH nor in CUDA_HOME")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", printed)
    if release is None:
        raise ImportError(f"{nvcc} --version does not say its release")
    return nvcc, (int(release[1]), int(release[2]))


def extensions() -> list[Extension]:
    if os.environ.get("MMKERNELS_SKIP_NATIVE") == "1":  # `make setup` builds them in a step of its own
        return []
    found = []
    makers = {"_planner": planner_extension, "_C": cpu_extension, "_C_cuda": cuda_extension}
    for name, make in makers.items():
        try:
            found.append(make())
        except ImportError as error:
            print(f"mmkernels.{name} is left out: {error}. When that has changed, run `python -m mmkernels.build`.")
    return found


class OptionalBuild(build_ext):
    """Builds what can be built, compiling files in parallel, and says which module was left out and why."""

    def run(self):
        self.failed = []
        with parallel_compile():
            super().run()
        for extension in self.failed:
            self.remove_library(extension)
            print(
                f"{extension.name} was not built (the compiler's message is above); mmkernels works without it, "
                "slower. With a C++20 compiler (nvcc for _C_cuda), run `python -m mmkernels.build`."
            )

    def build_extension(self, extension):
        try:
            self.compile(extension)
        except Exception:
            self.failed.append(extension)
            self.remove_library(extension)
            raise

    def remove_library(self, extension):
        """What older sources gave, which Python would take for these; beside the sources, once `run` has built."""
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    def compile(self, extension):
        command = getattr(extension, "nvcc_command", None)
        if command is None:
            return super().build_extension(extension)
        target = self.get_ext_fullpath(extension.name)
        if not self.force and not outdated(target, [*extension.sources, *extension.depends]):
            return None
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run([*command, "-o", target]).returncode:
            raise CompileError("nvcc failed")
        return None


def outdated(target: str, files: list[str]) -> bool:
    if not Path(target).exists():
        return True
    return any(os.path.getmtime(file) > os.path.getmtime(target) for file in files)


def parallel_compile():
    try:
        from pybind11.setup_helpers import ParallelCompile
    except ImportError:
        return contextlib.nullcontext()
    return ParallelCompile(default=os.cpu_count() or 1)


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})

"""Builds all native modules with a CUDA torch, without a GPU, and runs one `_C` binary on two versions of torch.

    PYTHON_WITH_CUDA_TORCH tests/cuda_build.py [--also OTHER_PYTHON]

`make test-cuda-build` does this with torch 2.11 in an environment of its own.  Everything happens in a copy of the
checkout: its own modules stay as they are.  Both environments need torch, numpy, pytest and hypothesis, the first also
setuptools 77 and pybind11, and timm with torchvision, whose tests run here because torchvision loads only beside a CUDA
build of torch.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("_planner", "_C", "_C_cuda")
IMPORTS = """
import torch
from pathlib import Path
import mmkernels
from mmkernels import _planner, native
assert Path(mmkernels.__file__).parent == Path.cwd() / "mmkernels", mmkernels.__file__
native.load_cpu_ops()
import mmkernels.ops.packing.cpp_impl
if torch.version.cuda is not None:
    from mmkernels.ops.packing import cuda_impl, schemas
    for name in schemas.OPERATORS:
        if name != "scatter_rows_sum":  # sorts first, in Python
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mm_cuda::{name}", "CUDA"), name
print("imported", _planner.__name__, "_C", "_C_cuda" if torch.version.cuda else "", "on torch", torch.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--also", type=Path, help="a Python whose torch, of another version, must run the same _C")
    other = parser.parse_args().also
    pythons = [Path(sys.executable)] + ([other.absolute()] if other else [])
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tree)
        for name in ("csrc", "mmkernels", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        run(tree, sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        missing = [name for name in MODULES if not list((tree / "mmkernels").glob(f"{name}.*.so"))]
        if missing:
            sys.exit(f"not built: {', '.join(missing)} (the compiler's message is above)")
        for python in pythons:
            run(tree, python, "-c", IMPORTS)
        for python in pythons:
            run(tree, python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/packing", "-k", "not cuda")
        run(tree, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/compat/test_timm.py")


def run(tree: Path, python: str | Path, *command: str) -> None:
    done = subprocess.run([str(python), *command], cwd=tree, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{python} {' '.join(command[:3])} failed")


if __name__ == "__main__":
    main()

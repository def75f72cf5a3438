"""Runs the tests of the planner and the CPU operators on modules built with ASan and UBSan; any finding ends it.

    PYTHON tests/sanitize.py [PYTEST ARGUMENTS]

`make sanitize` does this.  The modules are built in a copy of the checkout.  Python itself is not instrumented, so the
sanitizer's library is loaded ahead of it; leaks are not looked for (Python and torch keep what they allocate).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Wherever C++ computes.  Not the Triton tests, the graphs (they compile nothing new) or what builds modules itself.
TESTS = [
    "tests/ops",
    "tests/test_planner.py",
    "tests/test_packs.py",
    "tests/test_pack_stream.py",
    "tests/test_ranks.py",
]
TESTS += ["tests/test_layout.py", "tests/test_masks.py"]
SKIPPED = "not triton and not compile and not graph and not cuda and not mutations"


def main() -> None:
    compiler = os.environ.get("CXX", "g++")
    libraries = [library_of(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tree)
        for name in ("csrc", "mmkernels", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        built = run(tree, "setup.py", "-q", "build_ext", "--inplace", MMKERNELS_SANITIZE="1")
        if built or len(list((tree / "mmkernels").glob("*.so"))) < 2:
            sys.exit("the sanitized modules were not built (the compiler's message is above)")
        preload = {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "OMP_NUM_THREADS": "2",
        }
        if not run(tree, "-c", OVERRUN, **preload):
            sys.exit("the sanitizer does not see a read past the end: it is not at work")
        tests = sys.argv[1:] or [test for test in TESTS if (tree / test).exists()]
        pytest = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--ignore-glob=*triton*", "-k", SKIPPED)
        sys.exit(run(tree, *pytest, *tests, **preload))


# One byte past the end of a block: the sanitizer's own memmove must end this process.
OVERRUN = """
import ctypes
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
start = c.malloc(64)
c.memmove(start, start + 1, 64)
"""


def library_of(compiler: str, name: str) -> str:
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    if not Path(path.strip()).is_absolute():
        sys.exit(f"{compiler} has no {name}: install the sanitizer libraries of your compiler")
    return path.strip()


def run(tree: Path, *command: str, **environment: str) -> int:
    return subprocess.run([sys.executable, *command], cwd=tree, env=os.environ | environment).returncode


if __name__ == "__main__":
    main()

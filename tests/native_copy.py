"""A copy of the checkout with native modules built otherwise, for tests/sanitize.py and tests/vector_widths.py."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Wherever C++ computes.  Not the Triton tests, the graphs (they compile nothing new) or what builds modules itself.
TESTS = ("tests/ops", "tests/test_planner.py", "tests/test_packs.py", "tests/test_pack_stream.py")
TESTS += ("tests/test_ranks.py", "tests/test_layout.py", "tests/test_masks.py")
SKIPPED = "not triton and not compile and not graph and not cuda and not mutations"


@contextlib.contextmanager
def built(**environment: str) -> Iterator[Path]:
    """The copy's folder, its modules built by setup.py in this environment.  Ends the process where they are not."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tree)
        for name in ("csrc", "mmkernels", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        failed = run(tree, "setup.py", "-q", "build_ext", "--inplace", **environment)
        if failed or len(list((tree / "mmkernels").glob("*.so"))) < 2:
            sys.exit("the modules were not built (the compiler's message is above)")
        yield tree


def run(tree: Path, *command: str, **environment: str) -> int:
    """The exit code of Python with these arguments, in the copy."""
    return subprocess.run([sys.executable, *command], cwd=tree, env=os.environ | environment).returncode


def run_tests(tree: Path, *pytest: str, tests: list[str] | None = None, **environment: str) -> int:
    """The exit code of the tests that are named, or of all that concern native modules."""
    found = tests or [test for test in TESTS if (tree / test).exists()]
    arguments = ("-q", "-x", "-p", "no:cacheprovider", "--ignore-glob=*triton*", "-k", SKIPPED, *pytest)
    return run(tree, "-m", "pytest", *arguments, *found, **environment)

"""Installing where something is missing: it goes on in pure Python and says what is missing."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mmkernels import native, planner

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns("*.so", "__pycache__")


def run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=clean | environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def tree(tmp_path):
    """A copy of what an install reads, without anything built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "mmkernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=SKIP)
    return tmp_path


def test_no_compiler(tree):
    """The build command of an editable install, with compilers that fail; what older sources gave does not stay."""
    stale = tree / "mmkernels" / f"_planner{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.touch()
    os.utime(stale, (0, 0))
    built = run(tree, "setup.py", "-q", "build_ext", "--inplace", CC="/bin/false", CXX="/bin/false")
    assert built.returncode == 0, built.stderr
    for name in ("_planner", "_C"):
        assert f"mmkernels.{name} was not built" in built.stdout
    assert not stale.exists()
    # An editable install of the checkout would lend its own modules to this copy.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]; "
    program = "import mmkernels; print(mmkernels.plan_packs([3, 5], 8).fill, mmkernels.explain())"
    used = run(tree, "-c", alone + program)
    assert used.stdout.startswith("1.0 "), used.stderr
    assert "mmkernels._C is not built" in used.stdout
    assert "mmkernels._planner is not built" in used.stdout


def test_no_torch_and_no_pybind11(tree):
    """As inside a build environment that holds neither."""
    for name in ("torch", "pybind11"):
        (tree / "absent" / name).mkdir(parents=True)
        (tree / "absent" / name / "__init__.py").write_text(f"raise ImportError('no {name} here')\n")
    built = run(tree, "setup.py", "-q", "build_ext", "--inplace", PYTHONPATH=str(tree / "absent"))
    assert built.returncode == 0, built.stderr
    assert "mmkernels._planner is left out: no pybind11 here" in built.stdout
    assert "mmkernels._C is left out: no torch here" in built.stdout
    assert "mmkernels._C_cuda is left out: no torch here" in built.stdout


def test_an_sdist_holds_all_sources_also_where_nothing_can_be_built(tree):
    packed = run(tree, "setup.py", "-q", "sdist", MMKERNELS_SKIP_NATIVE="1")
    assert packed.returncode == 0, packed.stderr
    with tarfile.open(next((tree / "dist").iterdir())) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert expected <= names


def test_an_installed_package_is_not_told_to_build_in_place(tree):
    """`python -m mmkernels.build` needs the sources, which an installed package does not have."""
    command = "-c", "from mmkernels import native; print(native.HOW_TO_BUILD)"
    assert run(tree, *command, PYTHONPATH=str(tree)).stdout == "run: python -m mmkernels.build\n"
    (tree / "setup.py").unlink()
    assert "in a checkout: pip install" in run(tree, *command, PYTHONPATH=str(tree)).stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: nothing can be built")
def test_a_compiler_means_built_modules():
    """Tests of the C++ parts are skipped where these are not built: without this one a broken build would pass."""
    for name in ("_planner", "_C"):
        assert native.path_of(name) is not None, f"mmkernels.{name} is not built: python -m mmkernels.build says why"


def test_build_says_where_it_can_run(tree):
    shutil.rmtree(tree / "csrc")
    built = run(tree, "-m", "mmkernels.build")
    assert built.returncode == 1
    assert "run it in a checkout" in built.stdout


def test_path_of_finds_what_python_imports():
    assert (native.path_of("_planner") is not None) == (planner.BACKEND == "cpp")

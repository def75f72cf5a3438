"""The shape of the house, enforced: import arrows, file sizes, the one environment reader, the README's file map."""

import ast
import re
from pathlib import Path

import pytest
from file_map import END, ROOT, START, render, summary, tracked

import mmkernels

MAX_LINES = 600
IMPLEMENTATIONS = ("reference", "torch_impl", "cpp_impl", "triton_kernels", "cuda_impl")
MMKERNELS_PUBLIC = re.compile(r"mmkernels(\.(modules|layout|masks|ops\.\w+\.api)(\.\w+)?|\.[A-Za-z_]+)?$")


def python_files(folder):
    return [path for path in tracked(".py") if path.parts[0] == folder]


def imports(path):
    """Every dotted name a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative imports would hide an arrow from this test
                base = ".".join([*path.parent.parts[: len(path.parent.parts) - node.level + 1], base]).rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def starts(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("path", python_files("mmkernels"), ids=str)
def test_kernels_import_neither_model_nor_benchmarks(path):
    assert not [n for n in imports(path) if starts(n, "mmmodel", "benchmarks", "tests")]


@pytest.mark.parametrize("path", python_files("mmmodel"), ids=str)
def test_model_imports_public_names_of_kernels_only(path):
    inner = [f"mmkernels.{name}" for name in ("planner", "dispatch", "settings", "build", "native", "kernel_spec")]
    for name in imports(path):
        if starts(name, "mmkernels"):
            assert MMKERNELS_PUBLIC.match(name), name
            assert not starts(name, *inner), name


OPERATOR_FILES = [path for path in python_files("mmkernels") if path.parts[1] == "ops" and len(path.parts) == 4]


@pytest.mark.parametrize("path", OPERATOR_FILES, ids=str)
def test_arrows_inside_an_operator(path):
    """api -> op -> dispatch -> implementation; implementations know neither one another nor another operator."""
    op, stem = path.parts[2], path.stem
    package = f"mmkernels.ops.{op}"
    names = imports(path)
    assert not [n for n in names if starts(n, "mmkernels.ops") and not starts(n, package)], "another operator"
    siblings = {n.removeprefix(package + ".").split(".")[0] for n in names if starts(n, package)}
    if stem in ("api", "op"):
        assert not siblings & set(IMPLEMENTATIONS), "implementations are loaded by dispatch"
    if stem in ("op", "reference"):
        assert not [n for n in names if starts(n, "triton")]
    if stem == "op":
        assert "api" not in siblings
    if stem in IMPLEMENTATIONS:
        assert not siblings & ({*IMPLEMENTATIONS, "api", "op"} - {stem})


def test_editors_see_the_names_that_are_loaded_lazily():
    block = next(
        node
        for node in ast.parse((ROOT / "mmkernels" / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {alias.asname: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    assert seen == {name: f"{module}.{name}" for name, module in mmkernels._LAZY.items()}


def test_only_settings_reads_the_environment():
    pattern = re.compile(r"\bos\.(environ|getenv)|\bgetenv\(|from os import .*environ")
    readers = []
    for path in tracked(".py", ".cpp", ".h", ".cu"):
        if path.parts[0] == "tests" or path == Path("setup.py") or path.name == "settings.py":
            continue
        if pattern.search((ROOT / path).read_text()):
            readers.append(str(path))
    assert readers == []


def test_kernels_and_planner_know_no_torch_header():
    for path in tracked(".cpp", ".h", ".cu", ".cuh"):
        if path.parts[:2] in (("csrc", "kernels"), ("csrc", "cpu"), ("csrc", "planner")):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", (ROOT / path).read_text()), path


def test_no_file_is_too_long():
    sizes = {p: len((ROOT / p).read_text().splitlines()) for p in tracked(".py", ".cpp", ".h", ".cu", ".cuh")}
    assert {str(p): n for p, n in sizes.items() if n > MAX_LINES} == {}


def test_every_file_says_what_it_is():
    files = [p for p in tracked(".py", ".cpp", ".h", ".cu", ".cuh") if p.name != "__init__.py"]
    assert [str(p) for p in files if not summary(p)] == []


def test_readme_file_map_is_true():
    readme = (ROOT / "README.md").read_text()
    written = START + readme.split(START)[1].split(END)[0] + END
    assert written == render(), "run `make filemap`"

"""The README's file map: one line per source file, taken from the file's own first line.

`python tests/file_map.py --write` rewrites it; tests/test_house.py checks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mmkernels", "csrc", "mmmodel", "benchmarks")
START, END = "<!-- file map: make filemap -->", "<!-- end of file map -->"


def tracked(*suffixes: str) -> list[Path]:
    """Files that git tracks or would add, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return sorted(Path(name) for name in set(listed) if name.endswith(suffixes) and (ROOT / name).exists())


def summary(path: Path) -> str:
    """The first sentence of what a file says that it is."""
    text = (ROOT / path).read_text()
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    else:
        match = re.match(r"//\s*(.*)", text)
        line = match.group(1) if match else ""
    return re.split(r"(?<=[^.])\.(?:\s|$)|\s{2,}", line)[0].strip()


def render() -> str:
    lines = []
    for folder in FOLDERS:
        files = [p for p in tracked(".py", ".cpp", ".h", ".cu", ".cuh") if p.parts[0] == folder]
        lines += [f"{p.as_posix():<50} {summary(p)}" for p in files if p.name != "__init__.py"]
    return "\n".join([START, "```text", *lines, "```", END])


def write() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(before + render() + rest.split(END)[1])


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    else:
        print(render())

"""The generated part of a page written by hand: between two comments, which stay."""

from __future__ import annotations

from pathlib import Path


def replace(path: Path, name: str, text: str) -> None:
    """Puts text between the marks of `name`.  Raises ValueError where the page has not exactly one of each."""
    start, end = f"<!-- {name}: python -m benchmarks report -->", f"<!-- end of {name} -->"
    page = path.read_text()
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"report: {path.name} must hold, once and in this order: {start} and {end}")
    before, rest = page.split(start)
    path.write_text(f"{before}{start}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}")

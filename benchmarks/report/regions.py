"""The generated part of a page written by hand: between two comments, which stay."""

from __future__ import annotations

from pathlib import Path


def read(path: Path, name: str) -> str:
    """What stands between the marks of `name`.  Raises ValueError where the page has not exactly one of each."""
    return _parts(path, name)[1]


def replace(path: Path, name: str, text: str) -> None:
    """Puts text there.  Raises ValueError as `read` does."""
    before, _, behind = _parts(path, name)
    path.write_text(f"{before}\n\n{text.strip()}\n\n{behind}")


def _parts(path: Path, name: str) -> tuple[str, str, str]:
    """The page up to the first mark and with it, what stands between, and the page from the second mark on."""
    start, end = f"<!-- {name}: python -m benchmarks report -->", f"<!-- end of {name} -->"
    page = path.read_text()
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"report: {path.name} must hold, once and in this order: {start} and {end}")
    first, last = page.index(start) + len(start), page.index(end)
    return page[:first], page[first:last], page[last:]

"""python -m benchmarks report: report.md, report.html and plots in a folder; the generated parts of README and docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.report import documents, evidence, page, plots, regions, tables

README = ("README.md", "benchmark summary")
EVIDENCE = ("docs/evidence.md", "gpu evidence")


def run(paths: list[Path], out: Path, *, docs: bool, root: Path = ROOT) -> int:
    """Returns an exit code: 2 where there is nothing to report on."""
    found, left_out = documents.load(paths)
    for line in left_out:
        print(f"report: left out {line}", file=sys.stderr)
    if not found:
        print("report: none of the files is a benchmark document", file=sys.stderr)
        return 2
    if docs and (lost := _lost(paths, root)):
        print(f"report: {lost}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for name in _drawn_before(out / "report.md"):  # the runs of an earlier report may have had other names
        (out / name).unlink(missing_ok=True)
    images = {}
    if plots.can_draw():
        images = {document.name: plots.draw(document, out) for document in found}
    else:
        print("report: without plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    (out / "report.md").write_text(tables.markdown(found, left_out, images))
    (out / "report.html").write_text(page.html(found, left_out, images, out))
    print(f"report: {len(found)} run{'s' * (len(found) > 1)} in {out / 'report.md'} and {out / 'report.html'}")
    if docs:
        try:
            regions.replace(root / README[0], README[1], tables.summary(found))
            regions.replace(root / EVIDENCE[0], EVIDENCE[1], evidence.render(paths))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"report: rewrote the generated parts of {README[0]} and {EVIDENCE[0]}")
    return 0


def _lost(paths: list[Path], root: Path) -> str:
    """What the pages would lose without a word: a GPU whose folder was not named."""
    try:
        before = evidence.gpus_in(regions.read(root / EVIDENCE[0], EVIDENCE[1]))
    except ValueError as error:
        return str(error).removeprefix("report: ")
    gone = before - evidence.gpus_in(evidence.render(paths))
    if not gone:
        return ""
    name = ", ".join(sorted(gone))
    return f"{EVIDENCE[0]} has results of {name}, the files have none: name its folder too, or take its rows out first"


def _drawn_before(page: Path) -> list[str]:
    """The pictures of an earlier report, which stand beside it; other files of the folder are not ours."""
    return re.findall(r"^!\[\w+\]\(([^/()]+\.png)\)$", page.read_text(), re.MULTILINE) if page.exists() else []

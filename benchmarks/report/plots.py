"""PNG plots of one run: rate over length, percent of limit, and a heat map of ratios to each peer.

Narrow and with large type, so that a page on a phone can show them as they are.
"""

from __future__ import annotations

import importlib.util
import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.report.documents import Case, Document, cases

WIDTH = 5.4  # inches
DPI = 150
# Okabe and Ito's colours, told apart by most eyes; ours is always the first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#8c510a", "#7f3c8d")
MARKERS = "osD^vPX*<>"
UNIFORM = re.compile(r"uniform \d+x(?P<length>\d+) (?P<rest>.*?) ?T\d+ (?P<shape>.*)")  # of attention_cases' names
MAX_CELLS = 6  # columns of a heat map, beyond which its numbers become too small to read


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(document: Document, folder: Path) -> dict[str, list[str]]:
    """Writes the plots; operator -> file names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images: dict[str, list[str]] = {}
    style = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    for op in document.ops():
        for kind, figure in _figures(document, op, pyplot, style):
            name = f"{document.name}-{op}-{kind}.png"
            _save(figure, folder / name)
            pyplot.close(figure)
            images.setdefault(op, []).append(name)
    return images


def _figures(document: Document, op: str, pyplot, style: dict) -> Iterator[tuple[str, object]]:
    found = cases(document.timed(op))
    directions = list(dict.fromkeys(case.direction for case in found))
    with pyplot.rc_context(style):
        for direction in directions:
            those = [case for case in found if case.direction == direction]
            name = direction.replace("+", "-")
            lengths = over_length(those)
            if lengths:
                yield f"length-{name}", _length_figure(pyplot, lengths, direction)
            if any(case.ours and case.ours["percent_of_limit"] for case in those):
                yield f"limit-{name}", _limit_figure(pyplot, those, direction)
            if any(case.ours and any(map(case.like, case.peers)) for case in those):
                yield f"ratio-{name}", _ratio_figure(pyplot, those, direction)


def over_length(found: list[Case]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Of the cases whose samples are all of one length: shape -> implementation -> (length, rate), two at least."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for case in found:
        match = UNIFORM.match(case.case)
        if not match:
            continue
        # H changes with the length in no table; T / B does, so neither is part of the name.
        shape = f"{match['rest']}, {match['shape']}, {case.dtype}"
        for row in [case.ours, *case.others, *case.peers]:
            if row:
                series.setdefault(shape, {}).setdefault(row["impl"], []).append((int(match["length"]), row["rate"]))
    for lines in series.values():
        for points in lines.values():
            points.sort()
    return {
        shape: lines for shape, lines in series.items() if len({length for p in lines.values() for length, _ in p}) > 1
    }


def _length_figure(pyplot, series: dict, direction: str):
    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    rows = -(-len(names) // 3)  # of the legend
    height = 2.5 * len(series) + 0.3 * rows + 0.4
    figure, panels = pyplot.subplots(len(series), figsize=(WIDTH, height), squeeze=False, layout="constrained")
    for axes, (shape, lines) in zip(panels[:, 0], series.items(), strict=True):
        for name, points in lines.items():
            index = names.index(name)
            axes.plot(*zip(*points, strict=True), color=_colour(index), marker=MARKERS[index % 10], ms=4, label=name)
        lengths = sorted({length for points in lines.values() for length, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(f"{shape}, {direction}", loc="left")
        axes.set_ylabel("rate, TFLOP/s")
        axes.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("tokens per sample")
    handles = {h.get_label(): h for axes in panels[:, 0] for h in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3, frameon=False)
    return figure


def _limit_figure(pyplot, found: list[Case], direction: str):
    those = [case for case in found if case.ours and case.ours["percent_of_limit"]]
    labels = [_label(case) for case in those]
    figure, axes = pyplot.subplots(figsize=(WIDTH, _height(labels) + 1.1), layout="constrained")
    places = range(len(labels))
    axes.barh(places, [case.ours["percent_of_limit"] for case in those], color=COLOURS[0], height=0.5, label="ours")
    best = [(place, case.best["percent_of_limit"]) for place, case in zip(places, those, strict=True) if case.best]
    if best:
        ys, xs = zip(*best, strict=True)
        axes.plot(xs, ys, "D", color=COLOURS[1], ms=6, label="fastest peer of the case", clip_on=False)
    axes.axvline(100, color="black", lw=1, ls="--")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("percent of the limit measured in this run")
    axes.set_title(direction, loc="left")
    axes.grid(axis="x", alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside upper left", ncols=2, frameon=False)
    return figure


def _ratio_figure(pyplot, found: list[Case], direction: str):
    """Rows: cases; columns: the peers of the same block's cases that a row of ours compares with."""
    from matplotlib.colors import TwoSlopeNorm

    blocks: dict[tuple[str, ...], list[Case]] = {}
    for case in found:
        peers = [peer["impl"] for peer in case.peers if case.like(peer)] if case.ours else []
        if peers:
            blocks.setdefault(tuple(sorted(peers)), []).append(case)
    groups = [
        (peers[i : i + MAX_CELLS], those) for peers, those in blocks.items() for i in range(0, len(peers), MAX_CELLS)
    ]
    labels = [[_label(case) for case in those] for _, those in groups]
    columns = [[column_head(peer) for peer in peers] for peers, _ in groups]
    heads = [0.2 * max(text.count("\n") + 1 for text in names) + 0.25 for names in columns]
    heights = [_height(names) + head for names, head in zip(labels, heads, strict=True)]
    figure, panels = pyplot.subplots(
        len(groups), figsize=(WIDTH, sum(heights) + 0.9), height_ratios=heights, squeeze=False, layout="constrained"
    )
    norm = TwoSlopeNorm(0.0, -2.0, 2.0)  # log2: red is 4 times slower, blue 4 times faster; beyond is no darker
    for axes, (peers, those), names, heading in zip(panels[:, 0], groups, labels, columns, strict=True):
        grid = np.full((len(those), max(len(peers), 3)), np.nan)
        for i, case in enumerate(those):
            ratios = {peer["impl"]: case.ratio(peer) for peer in case.peers}
            for j, peer in enumerate(peers):
                grid[i, j] = np.log2(ratios[peer])
                dark = abs(grid[i, j]) > 1.3
                text = f"{ratios[peer]:.2f}" if ratios[peer] < 99.5 else f"{ratios[peer]:.0f}"
                axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
        axes.imshow(grid, cmap="RdBu", norm=norm, aspect="auto")
        axes.set_xticks(range(len(peers)), heading)
        axes.set_yticks(range(len(those)), names)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
    figure.suptitle(f"{direction}: ours over each peer (blue: ours is faster)", x=0.01, ha="left", fontsize=10)
    return figure


def column_head(peer: str) -> str:
    """Lines of about 9 letters; a longer word is cut at a dot, a plus or a bracket: torch.nested, padded[mask]."""
    words = peer.replace("_", " ").split()
    parts = [part for word in words for part in (re.split(r"(?<=[.+])|(?=[(\[])", word) if len(word) > 9 else [word])]
    return textwrap.fill(" ".join(parts), 9, break_long_words=False)


def _save(figure, path: Path) -> None:
    """With 64 colours, which is all that a plot needs and a quarter of the size; no date and no version inside."""
    from PIL import Image  # matplotlib needs it too

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    image = Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, "PNG", optimize=True)


def _label(case: Case) -> str:
    return textwrap.fill(f"{case.case} {case.dtype}", 24)


def _height(labels: list[str]) -> float:
    return sum(0.19 * (label.count("\n") + 1) + 0.12 for label in labels)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]

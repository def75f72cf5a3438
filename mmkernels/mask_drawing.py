"""Draws what a mask lets through, as the kernels get it.   B samples, Tq queries, Tk keys, M modalities.

As text or as a picture, both made from the lowered MaskPlan, not from the request, so that they show what a kernel
would compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mmkernels.masks import MaskPlan
from mmkernels.ops.attention import reference

MAX_TEXT = 160  # keys in a text drawing, one column each
MAX_CELLS = 4096  # queries or keys in a picture: beyond it a pixel would hold several
COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")  # told apart by all eyes
OTHER_SAMPLE, UNSEEN = "#E4E4E4", "#FFFFFF"
# color, line style and width
TILE_STYLES = {"empty": ("#888888", ":", 1.0), "partial": ("#000000", "--", 1.2), "full": ("#000000", "-", 1.8)}


class Block(NamedTuple):
    """One tile of the kernels' walk: rows [top, bottom), columns [left, right); kind is a key of TILE_STYLES."""

    top: int
    bottom: int
    left: int
    right: int
    kind: str


def seen_pairs(plan: MaskPlan) -> np.ndarray:
    """bool [Tq, Tk]: which key each query sees.  Raises ValueError where that is too much to draw."""
    for name, side in (("queries", plan.layout), ("keys", plan.k_layout)):
        if side.total_tokens > MAX_CELLS:
            raise ValueError(f"mask drawing: {side.total_tokens} {name}, expected at most {MAX_CELLS}")
    return reference.seen_pairs(plan.q_table.cpu(), plan.k_table.cpu()).numpy()


def tile_blocks(plan: MaskPlan, rows: int, cols: int, schedule: str = "sample") -> list[Block]:
    """The blocks that a forward kernel with tiles of rows x cols visits (partial, full) and those it skips (empty)."""
    tiles = plan.tiles("query", rows, cols, schedule)
    spans = tiles.spans.tolist()
    q_bounds, k_bounds = (side.cu_seqlens.tolist() for side in (plan.layout, plan.k_layout))
    if schedule == "token":
        q_bounds, k_bounds = [0, q_bounds[-1]], [0, k_bounds[-1]]
    walked = {top: spans[first:last] for top, _, first, last in tiles.tiles.tolist()}
    blocks = []
    for (start, stop), (first_key, last_key) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        for top in range(start, stop, rows):
            kinds = {}
            for left, right, masked in walked.get(top, []):
                kinds |= dict.fromkeys(range(left, right, cols), "partial" if masked else "full")
            for left in range(first_key, last_key, cols):
                kind = kinds.get(left, "empty")
                blocks.append(Block(top, min(top + rows, stop), left, min(left + cols, last_key), kind))
    return blocks


def describe(plan: MaskPlan, blocks: Sequence[Block] = ()) -> str:
    """One line of counts, and one for the tiles."""
    queries, keys, visible = plan.layout.total_tokens, plan.k_layout.total_tokens, plan.visible_pairs
    share = f" ({100 * visible / (queries * keys):.1f} %)" if queries * keys else ""
    blind = int((~seen_pairs(plan).any(1)).sum())
    lines = [f"{queries} queries x {keys} keys, {visible} pairs visible{share}; {blind} queries see nothing"]
    if blocks:
        count = {kind: sum(b.kind == kind for b in blocks) for kind in TILE_STYLES}
        lines.append("tiles: " + ", ".join(f"{n} {kind}" for kind, n in count.items()))
    return "\n".join(lines)


def text(plan: MaskPlan, names: Sequence[str]) -> str:
    """One line per query, one column per key: # seen, . not, a gap between samples."""
    if plan.k_layout.total_tokens > MAX_TEXT:
        raise ValueError(
            f"mask drawing: {plan.k_layout.total_tokens} keys, as text at most {MAX_TEXT}; draw a picture with --out"
        )
    key_bounds = list(pairwise(plan.k_layout.cu_seqlens.tolist()))
    width = max([len("keys"), *map(len, names)])

    def in_samples(marks: Sequence[str]) -> str:
        return "  ".join("".join(marks[a:b]) for a, b in key_bounds)

    digits = [str(m % 10) for m in plan.k_layout.modality_ids.tolist()]
    lines = ["modalities: " + ", ".join(f"{m} {name}" for m, name in enumerate(names)), ""]
    lines += [f"{'keys':>{width}}  {in_samples(digits)}"]
    modality, seen = plan.layout.modality_ids.tolist(), seen_pairs(plan)
    for start, stop in pairwise(plan.layout.cu_seqlens.tolist()):
        for query in range(start, stop):
            marks = ["#" if s else "." for s in seen[query]]
            lines.append(f"{names[modality[query]]:>{width}}  {in_samples(marks)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def figure(plan: MaskPlan, blocks: Sequence[Block] = (), *, names: Sequence[str], title: str | None = None):
    """A matplotlib Figure: queries down, keys across, each visible pair in the color of the key's modality."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "mask drawing: a picture needs matplotlib, which is not installed (pip install matplotlib); without --out "
            "the drawing is text"
        ) from error
    seen = seen_pairs(plan)
    queries, keys = seen.shape
    if not seen.size:
        raise ValueError(f"mask drawing: {queries} queries x {keys} keys, there is nothing to draw")
    # A tenth of an inch or so per cell, but never a stamp or a poster; the rest is room for labels.
    scale = 4.2 / max(queries, keys)
    inner = max(keys * scale, 1.6), max(queries * scale, 1.6)
    size = inner[0] + 2.3, inner[1] + (1.1 if title else 0.8)
    drawing = Figure(figsize=size)
    axes = drawing.add_axes((0.75 / size[0], 0.1 / size[1], inner[0] / size[0], inner[1] / size[1]))
    axes.imshow(_pixels(plan, seen), extent=(0, keys, queries, 0), interpolation="nearest", aspect="auto")
    _bands(axes, plan, inner)
    if max(queries, keys) <= 64:
        axes.vlines(range(keys + 1), 0, queries, color="#CCCCCC", linewidth=0.3)
        axes.hlines(range(queries + 1), 0, keys, color="#CCCCCC", linewidth=0.3)
    for edges, lines, stop in (
        (plan.k_layout.cu_seqlens.tolist(), axes.vlines, queries),
        (plan.layout.cu_seqlens.tolist(), axes.hlines, keys),
    ):
        lines(edges, 0, stop, color="black", linewidth=1.4)
    _outline(axes, blocks)
    _legend(axes, plan, blocks, names)
    if title:
        drawing.text(0.75 / size[0], 1 - 0.28 / size[1], title, fontsize=10, fontweight="bold")
    return drawing


def _pixels(plan: MaskPlan, seen: np.ndarray) -> np.ndarray:
    """float [Tq, Tk, 3]."""
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(_color(m)) for m in range(plan.k_layout.num_modalities)])
    sample_of_query, sample_of_key = (
        np.repeat(np.arange(side.num_samples), np.diff(side.cu_seqlens.cpu().numpy()))
        for side in (plan.layout, plan.k_layout)
    )
    own = sample_of_query[:, None] == sample_of_key[None, :]
    pixels = np.where(own[..., None], to_rgb(UNSEEN), to_rgb(OTHER_SAMPLE))
    return np.where(seen[..., None], palette[plan.k_layout.modality_ids.cpu().numpy()][None], pixels)


def _bands(axes, plan: MaskPlan, inner: tuple[float, float]) -> None:
    """A strip along the keys and one along the queries: the modality of each token, and the number of each sample."""
    from matplotlib.patches import Rectangle

    queries, keys = plan.layout.total_tokens, plan.k_layout.total_tokens
    axes.set(xlim=(0, keys), ylim=(queries, 0))
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    across, down = (0.14 * n / inches for n, inches in zip((keys, queries), inner, strict=True))
    for side, along_keys in ((plan.layout, False), (plan.k_layout, True)):
        modality = side.modality_ids.tolist()
        edges = [0, *(i for i in range(1, len(modality)) if modality[i] != modality[i - 1]), len(modality)]
        for a, b in pairwise(edges):
            corner, size = ((a, -1.3 * down), (b - a, down)) if along_keys else ((-1.3 * across, a), (across, b - a))
            axes.add_patch(Rectangle(corner, *size, color=_color(modality[a]), linewidth=0, clip_on=False))
        spans = [(a, b, f"sample {i}") for i, (a, b) in enumerate(pairwise(side.cu_seqlens.tolist())) if b > a]
        room = min((b - a) * (inner[0] / keys if along_keys else inner[1] / queries) for a, b, _ in spans)
        labels = [name if room > 0.75 else name.removeprefix("sample ") for _, _, name in spans]
        middles = [(a + b) / 2 for a, b, _ in spans]
        word = "keys" if along_keys else "queries"
        if room <= 0.75:
            word += ", by sample"
        if room < 0.12:
            middles, labels = [], []
        if along_keys:
            axes.set_xticks(middles, labels, fontsize=8)
            axes.tick_params(axis="x", pad=14)
            axes.set_xlabel(word, fontsize=9)
        else:
            axes.set_yticks(middles, labels, fontsize=8, rotation=90, va="center")
            axes.tick_params(axis="y", pad=14)
            axes.set_ylabel(word, fontsize=9)


def _outline(axes, blocks: Sequence[Block]) -> None:
    from matplotlib.patches import Rectangle

    gap = 0.006 * max((*(b.bottom for b in blocks), *(b.right for b in blocks)), default=0)  # neighbours stay apart
    for b in blocks:
        color, style, width = TILE_STYLES[b.kind]
        corner, size = (b.left + gap, b.top + gap), (b.right - b.left - 2 * gap, b.bottom - b.top - 2 * gap)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linestyle=style, linewidth=width))


def _legend(axes, plan: MaskPlan, blocks: Sequence[Block], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = sorted({*plan.layout.modality_ids.tolist(), *plan.k_layout.modality_ids.tolist()})
    handles = [Patch(color=_color(m), label=names[m]) for m in used]
    handles.append(Patch(facecolor=UNSEEN, edgecolor="#999999", label="not seen"))
    if plan.layout.num_samples > 1:
        handles.append(Patch(facecolor=OTHER_SAMPLE, edgecolor="#999999", label="other sample"))
    for kind in [k for k in TILE_STYLES if any(b.kind == k for b in blocks)]:
        color, style, width = TILE_STYLES[kind]
        handles.append(Line2D([], [], color=color, linestyle=style, linewidth=width, label=f"{kind} tile"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, fontsize=8, frameon=False)


def _color(modality: int) -> str:
    return COLORS[modality % len(COLORS)]

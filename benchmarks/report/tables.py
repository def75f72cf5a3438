"""Markdown of a report: facts of each run, a table per operator, and the summary that the README embeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.harness import makes_mask
from benchmarks.report.documents import Case, Document, cases
from benchmarks.table import noted, number, ratio

TITLES = {
    "attention": "attention",
    "attention_tiles": "attention_tiles: forward of short samples, tile by tile",
    "compat": "compat: the drop-in replacements",
    "modality_embed": "modality_embed",
    "packing": "packing: pack, unpack, pad, unpad, gather_rows, segment_mean",
    "planner": "planner: packs, ranks, layouts",
    "data": "data: samples from shards, batches from features",
    "train_step": "train_step: a whole pretraining step",
}
HEADER = ("case", "dir", "dtype", "ours", "ms", "spread %", "rate", "% of limit", "times as fast as", "notes")


def markdown(documents: list[Document], left_out: list[str], images: dict[str, dict[str, list[str]]]) -> str:
    """images: document name -> operator -> files beside the page."""
    lines = ["# Benchmark report", ""]
    lines += [f"- {d.name}: {d.hardware}; {d.environment['date'][:10]} ({d.grade})" for d in documents]
    lines += ["", READING, "", summary(documents), ""]
    for document in documents:
        lines += [f"## {document.name}", "", facts(document), ""]
        for op in document.ops():
            lines += [f"### {TITLES.get(op, op)}", ""]
            lines += [f"![{op}]({name})" for name in images.get(document.name, {}).get(op, [])]
            lines += ["", *table(document, op), ""]
        missing = skipped(document)
        lines += ["Not timed:", "", *(f"- {line}" for line in missing), ""] if missing else []
    lines += ["Files left out:", "", *(f"- {line}" for line in left_out), ""] if left_out else []
    return "\n".join(lines)


READING = (
    "A row is one case in one direction: the implementation that we choose here, its median time, the spread (quarter "
    "to quarter over the median), its rate, percent of the copy or GEMM rate that was measured in the same run, and "
    "how many times as fast it is as each peer that ran, with a ~ where the medians are too uncertain to tell who is "
    "faster. All were checked against the reference before they were timed."
)
NO_GPU = "No result of a GPU is among these files: nothing here says how fast the kernels are on one."


def facts(document: Document) -> str:
    limits = ", ".join(
        f"{name.replace('_', ' ')} {number(x['value'])} {x['unit']}"
        + (f" ({number(x['after'])} at its end)" if "after" in x else "")
        for name, x in document.limits.items()
    )
    return (
        f"{document.hardware}. {document.versions}, commit {document.commit}. {document.environment['date']}, "
        f"seed {document.environment['seed']}, {document.grade}."
        + (f" Limits measured in this run: {limits}." if limits else "")
    )


def table(document: Document, op: str) -> list[str]:
    """Markdown lines."""
    return markdown_table(HEADER, body(document, op))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines; no cell breaks out of them."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *lines = [f"| {' | '.join(row)} |" for row in (header, *cells)]
    return [head, "|" + "---|" * len(header), *lines]


def body(document: Document, op: str) -> list[list[str]]:
    """Cells of one table, a line per case and direction; a case whose own row is missing says so."""
    rows = []
    for case in cases(document.timed(op)):
        ours = case.ours
        if ours is None:
            rows.append([case.case, case.direction, case.dtype, "not timed", *[""] * 6])
            continue
        percent = ours["percent_of_limit"]
        rows.append(
            [
                case.case,
                case.direction,
                case.dtype,
                ours["impl"],
                f"{ours['median_ms']:.4g}",
                f"{100 * ours['spread']:.0f}",
                f"{number(ours['rate'])} {ours['rate_unit']}",
                "" if percent is None else f"{percent:.0f}",
                ", ".join([*(against(case, peer) for peer in case.peers), *(ratio(ours, row) for row in case.others)]),
                notes(case),
            ]
        )
    return rows


def against(case: Case, peer: dict) -> str:
    """How many times as fast as the peer; whose ratio it is where that is not the row's own, or not of one kind."""
    like = case.like(peer)
    if like is None:
        return f"{ratio(case.ours, peer)} (makes its mask, ours kept its own)"
    return ratio(like, peer) if like is case.ours else f"{ratio(like, peer)} (by {like['impl']})"


def notes(case: Case) -> str:
    parts = noted(case.ours)
    # On a GPU a mask is made on the host or on the GPU: `ms` alone would leave out the one and count the other.
    both = [row for row in [*case.others, *case.peers] if makes_mask(row) and "host_ms" in row["extra"]]
    parts += [f"{row['impl']} host ms {row['extra']['host_ms']:.5g}" for row in both]
    parts += [f"{row['impl']} takes {row['median_ms']:.4g} ms" for row in case.yardsticks]
    return ", ".join(parts)


def skipped(document: Document) -> list[str]:
    """A line for each operator, implementation and reason."""
    found: dict[tuple[str, str, str], int] = {}
    for row in document.rows:
        if "skipped" in row:
            key = row["op"], row["impl"], row["skipped"]
            found[key] = found.get(key, 0) + 1
    return [f"{op}: {impl} ({count} rows): {reason}" for (op, impl, reason), count in found.items()]


SUMMARY_HEADER = ("", "times as fast as the fastest peer of each case", "% of limit")


def summary(documents: list[Document]) -> str:
    """Markdown of the newest figures of each device: medians over the cases, and the range."""
    lines = []
    for about, rows in summaries(documents):
        lines += [about, "", *markdown_table(SUMMARY_HEADER, rows), ""]
    if not any(document.on_gpu for document in documents):
        lines.append(NO_GPU)
    return "\n".join(lines).strip()


def summaries(documents: list[Document]) -> list[tuple[str, list[list[str]]]]:
    """(what on, rows under SUMMARY_HEADER) of each GPU, then of each CPU; of each case the newest run there."""
    devices = dict.fromkeys((not document.on_gpu, document.device) for document in documents)
    found = []
    for on_cpu, device in sorted(devices):
        newest: dict[tuple, Case] = {}
        used: list[Document] = []
        for document in documents:  # newest first
            if (not document.on_gpu, document.device) != (on_cpu, device):
                continue
            every = [case for op in document.ops() for case in cases(document.timed(op))]
            fresh = {c.key: c for c in every if c.key not in newest}
            used += [document] * bool(fresh)
            newest |= fresh
        facts = [(d.grade, d.hardware, d.versions, f"commit {d.commit}", d.environment["date"][:10]) for d in used]
        about = "; ".join(" / ".join(dict.fromkeys(parts)) for parts in zip(*facts, strict=True))
        order = {**TITLES, **dict.fromkeys(op for op, *_ in newest)}  # those without a title last
        by_op = {op: [case for case in newest.values() if case.op == op] for op in order}
        rows = [row for op, those in by_op.items() for row in _summary_rows(op, those)]
        if rows:
            found.append((f"{about[0].upper()}{about[1:]}. Medians over the cases (least to most).", rows))
    return found


def _summary_rows(op: str, found: list[Case]) -> list[list[str]]:
    lines = []
    for direction in dict.fromkeys(case.direction for case in found):
        those = [case for case in found if case.direction == direction and case.ours]
        ratios = [case.ratio(case.best) for case in those if case.best]
        percents = [case.ours["percent_of_limit"] for case in those if case.ours["percent_of_limit"] is not None]
        if those:
            name = f"{op}, {direction}, {len(those)} case{'s' if len(those) > 1 else ''}"
            if 0 < len(ratios) < len(those):
                name += f", {len(ratios)} with a peer"
            lines.append([name, _spread(ratios, 2, "no peer"), _spread(percents, 0, "")])
    return lines


def _spread(values: list[float], digits: int, none: str) -> str:
    if not values:
        return none
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"

"""Prints rows as they come: one table per problem, rich where it is installed, plain columns where not."""

from __future__ import annotations

from benchmarks.harness import PREFIX, makes_mask, may_be_equal

COLUMNS = ("dir", "dtype", "implementation", "ms", "spread %", "rate", "% of limit", "times as fast as", "notes")
NUMBERS = ("ms", "spread %", "rate", "% of limit")
STEADY = 0.9  # of what the machine could do at the start of a run: below it, it has slowed down
SHORT = {"pairs_computed_over_visible": "pairs"}  # of the JSON's names in the notes: pairs computed over visible
MARKS = ("auto", "yardstick", "makes_mask")  # extras that a row's name or place tells


def print_rows(rows: list[dict]) -> None:
    if not rows:
        return
    title = f"{rows[0]['op']}: {rows[0]['case']}"
    timed = [row for row in rows if "skipped" not in row]
    lines = [_cells(row, [other for other in timed if other["direction"] == row["direction"]]) for row in timed]
    skipped = _skipped(rows)
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:  # rich comes with the model extra; figures do not need it
        print(title)
        for cells in (COLUMNS, *lines) if lines else ():
            print("  " + "  ".join(cell.ljust(14) for cell in cells))
        print(*skipped, sep="\n", end="\n\n")
        return
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        numeric = column in NUMBERS
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for cells in lines:
        table.add_row(*map(escape, cells))
    console = Console()
    console = Console(width=None if console.is_terminal else max(console.width, 150))
    console.print(table if lines else escape(title))
    for line in skipped:
        console.print(escape(line), style="dim")


def _skipped(rows: list[dict]) -> list[str]:
    """A line for each reason, with those it stopped; the direction where it did not stop all of them."""
    directions = {row["direction"] for row in rows}
    stopped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "skipped" in row:
            stopped.setdefault((row["skipped"], row["impl"]), []).append(row["direction"])
    by_reason: dict[str, list[str]] = {}
    for (reason, impl), where in stopped.items():
        name = impl if set(where) == directions else f"{impl} ({', '.join(where)})"
        by_reason.setdefault(reason, []).append(name)
    return [f"skipped: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def print_missing(rows: list[dict]) -> None:
    """Who was timed nowhere in the whole run, and each one's reasons."""
    timed = {row["impl"] for row in rows if "skipped" not in row}
    reasons: dict[str, set[str]] = {}
    for row in rows:
        if "skipped" in row and row["impl"] not in {"all", *timed}:
            reasons.setdefault(row["impl"], set()).add(row["skipped"])
    for impl, why in sorted(reasons.items()):
        print(f"not here: {impl}: {'; '.join(sorted(why))}")


def print_limits(limits: dict) -> None:
    if not limits:
        return
    print("limits measured here: " + ", ".join(f"{k} {v['value']:.3g} {v['unit']}" for k, v in limits.items()))


def print_after(limits: dict) -> None:
    """Limits that are below what they were when the run began."""
    slower = [f"{name} {x['after'] / x['value']:.2f}" for name, x in limits.items() if x["after"] < STEADY * x["value"]]
    if slower:
        print(f"the machine slowed down meanwhile: of what was measured at the start, at the end {', '.join(slower)}")


def _cells(row: dict, beside: list[dict]) -> list[str]:
    """beside: the rows of the same case and direction."""
    extra = row.get("extra", {})
    name = row["impl"] + (" (auto)" if extra.get("auto", False) else "")  # what impl="auto" takes
    name += " (yardstick)" if extra.get("yardstick", False) else ""
    percent = row["percent_of_limit"]
    return [
        row["direction"],
        row["dtype"],
        name,
        f"{row['median_ms']:.4g}",
        f"{100 * row['spread']:.0f}",
        f"{number(row['rate'])} {row['rate_unit']}",
        "" if percent is None else f"{percent:.0f}",
        ", ".join(_ratios(row, beside)),
        ", ".join(noted(row)),
    ]


def noted(row: dict) -> list[str]:
    """The facts of a row, as notes have them."""
    extra = row.get("extra", {})
    return [f"{SHORT.get(k, k).replace('_', ' ')} {v:.5g}" for k, v in extra.items() if k not in MARKS]


def number(value: float) -> str:
    """Three digits, and no exponent where a reader expects none."""
    return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.3g}"


def ratio(row: dict, other: dict) -> str:
    """How many times as fast as the other row; with a ~ where the medians do not tell who is faster."""
    return f"{'~' * may_be_equal(row, other)}{row['rate'] / other['rate']:.2f} {other['impl']}"


def _ratios(row: dict, beside: list[dict]) -> list[str]:
    """Of our rows, against each peer of their kind (its mask kept, or made anew); the JSON has every pair."""
    if not row["impl"].startswith(PREFIX):
        return []
    peers = [other for other in beside if not other["impl"].startswith(PREFIX)]
    return [ratio(row, peer) for peer in peers if makes_mask(peer) == makes_mask(row)]

"""Prints rows as they come: one table per problem, rich where it is installed, plain columns where not."""

from __future__ import annotations

from benchmarks.harness import PREFIX

COLUMNS = ("dir", "dtype", "implementation", "ms", "±%", "rate", "% of limit", "times as fast as", "notes")


def print_rows(rows: list[dict]) -> None:
    if not rows:
        return
    title = f"{rows[0]['op']}: {rows[0]['case']}"
    lines = [_cells(row) for row in rows]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:  # rich comes with the model extra; figures do not need it
        print(title)
        for cells in (COLUMNS, *lines):
            print("  " + "  ".join(cell.ljust(14) for cell in cells))
        return
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        numeric = column in ("ms", "±%", "rate", "% of limit")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for cells, row in zip(lines, rows, strict=True):
        table.add_row(*map(escape, cells), style="dim" if "skipped" in row else None)
    console = Console()
    Console(width=None if console.is_terminal else max(console.width, 150)).print(table)


def print_limits(limits: dict) -> None:
    print("limits measured here: " + ", ".join(f"{k} {v['value']:.3g} {v['unit']}" for k, v in limits.items()))


def _cells(row: dict) -> list[str]:
    start = [row["direction"], row["dtype"], row["impl"]]
    if "skipped" in row:
        return [*start, "", "", "", "", "", f"skipped: {row['skipped']}"]
    percent = row["percent_of_limit"]
    return [
        *start,
        f"{row['median_ms']:.4g}",
        f"{100 * row['spread']:.0f}",
        f"{row['rate']:.3g} {row['rate_unit']}",
        "" if percent is None else f"{percent:.0f}",
        ", ".join(_ratios(row)),
        ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.get("extra", {}).items()),
    ]


def _ratios(row: dict) -> list[str]:
    """Of our rows, against each peer; the JSON has every pair."""
    if not row["impl"].startswith(PREFIX):
        return []
    return [f"{ratio:.2f} {peer}" for peer, ratio in row["speedup_over"].items() if not peer.startswith(PREFIX)]

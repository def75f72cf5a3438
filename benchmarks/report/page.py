"""One HTML page with everything in it: no script, no other file, no network."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.documents import Document

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 0 16px 48px;
       max-width: 1100px; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px;
         align-items: start; }
.plots img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; margin: 12px 0; border: 1px solid #ddd; } .wide.fit { border: 0; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 4px 8px; text-align: left; vertical-align: top; border-bottom: 1px solid #e5e5e5; }
th { background: #f4f4f4; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; min-width: 9em; max-width: 40vw; }
th:first-child { background: #f4f4f4; }
.fit th { white-space: normal; } .fit th, .fit td { padding: 4px 5px; } .fit :first-child { min-width: 0; }
td:nth-child(9) { min-width: 16em; } td:nth-child(10) { min-width: 10em; }
.warning { border-left: 4px solid #d55e00; padding: 4px 12px; background: #fff6f0; }
details { margin: 12px 0; } summary { cursor: pointer; }
@media (max-width: 640px) { /* a row becomes a card: ten columns do not fit a phone */
  .rows { border: 0; } .rows thead { display: none; }
  .rows table, .rows tbody, .rows tr { display: block; }
  .rows tr { border-top: 1px solid #ddd; padding: 6px 0; }
  .rows td { display: inline-block; padding: 0 12px 0 0; border: 0; min-width: 0; }
  .rows td.number { text-align: left; white-space: normal; }
  .rows td:first-child { display: block; position: static; max-width: none; font-weight: 600; }
  .rows td:nth-child(n + 9) { display: block; min-width: 0; }
  .rows td:nth-child(n + 5)::before { content: attr(data-label) " "; color: #666; }
  .rows td:empty { display: none; }
}
"""
NUMBERS = (4, 5, 6, 7)  # columns of tables.HEADER


def html(documents: list[Document], left_out: list[str], images: dict[str, dict[str, list[str]]], folder: Path) -> str:
    """images: as tables.markdown has them; folder: where the files are."""
    parts = ["<h1>Benchmark report</h1>"]
    if not any(document.on_gpu for document in documents):
        parts.append(f'<p class="warning">{escape(tables.NO_GPU)}</p>')
    parts.append(_paragraph(tables.READING))
    for about, rows in tables.summaries(documents):
        parts += [_paragraph(about), _table(tables.SUMMARY_HEADER, rows)]
    for document in documents:
        parts.append(f"<h2>{escape(document.name)}</h2>")
        parts.append(_paragraph(tables.facts(document)))
        for op in document.ops():
            parts.append(f"<h3>{escape(tables.TITLES.get(op, op))}</h3>")
            shown = [_image(folder / name, op) for name in images.get(document.name, {}).get(op, [])]
            parts.append(f'<div class="plots">{"".join(shown)}</div>' if shown else "")
            parts.append(_table(tables.HEADER, tables.body(document, op)))
        parts.append(_list("Not timed", tables.skipped(document)))
    parts.append(_list("Files left out", left_out))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmark report</title><style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(header: tuple[str, ...], body: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    numbers = NUMBERS if header == tables.HEADER else ()
    rows = ["".join(_cell(name, i in numbers, row[i]) for i, name in enumerate(header)) for row in body]
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    style = "wide rows" if header == tables.HEADER else "wide fit"
    return f'<div class="{style}"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _cell(column: str, is_number: bool, text: str) -> str:
    style = ' class="number"' if is_number else ""
    return f'<td{style} data-label="{escape(column)}">{escape(text)}</td>'


def _image(path: Path, op: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    kind = path.stem.split(f"{op}-")[-1].replace("-", " ")
    return f'<img alt="{escape(op)}: {escape(kind)}" src="data:image/png;base64,{data}">'


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{escape(title)} ({len(lines)})</summary><ul>{items}</ul></details>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"

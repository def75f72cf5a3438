"""One self-contained HTML page of an explanation: text, tables and pictures in a single file, for any width."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fafaf8; margin: 0 auto; padding: 1rem;
       max-width: 76rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p { max-width: 44rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; padding: .5rem; background: white; border: 1px solid #ddd; border-radius: 6px; width: 376px;
         max-width: 100%; }
figure img { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; overflow-wrap: normal; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 5rem; }
td.fact { text-align: left; white-space: normal; overflow-wrap: anywhere; }
footer { margin-top: 2rem; font-size: .85rem; color: #555; }
"""


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    pictures: Sequence[tuple[Path, str]] = ()  # file, what it shows in words
    heading: Sequence[str] = ()  # of the table
    rows: Sequence[Sequence[str]] = ()


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], footer: str) -> str:
    """The page.  All text is escaped: captions and keys are the data's, not ours."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        '<div class="table"><table>',
        *(f'<tr><th>{escape(name)}</th><td class="fact">{escape(value)}</td></tr>' for name, value in facts),
        "</table></div>",
        *(part for section in sections for part in _section(section)),
        f"<footer>{escape(footer)}</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
    if section.rows:
        parts += [
            '<div class="table"><table>',
            "<tr>",
            *(f"<th>{escape(name)}</th>" for name in section.heading),
            "</tr>",
        ]
        for row in section.rows:
            parts.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
        parts.append("</table></div>")
    if section.pictures:
        parts.append('<div class="pictures">')
        for path, words in section.pictures:
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{data}"></figure>')
        parts.append("</div>")
    return parts

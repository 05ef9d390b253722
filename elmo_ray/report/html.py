"""Pages of HTML: one file with its style in it, headings and tables, and nothing that is fetched."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from elmo_ray.storage.files import write_aside

_STYLE = (
    "body{font:15px/1.45 sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#222}"
    "h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ccc}"
    "table{border-collapse:collapse;margin:.6rem 0;font-size:13px}"
    "th,td{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}"
    "img{max-width:100%;display:block;margin:.6rem 0}.note{color:#555;font-size:13px}div.wide{overflow-x:auto}"
    "span.w,span.u{border:1px solid #bbb;border-radius:3px;padding:0 .2rem;line-height:1.8}"
    "span.u{border-color:#b00;color:#b00}"
)


def write_html(path: Path, title: str, body: Sequence[str]) -> None:
    """Write a page as one file that needs no other. body: its HTML, in pieces. Raises DataError for a full disk."""
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    write_aside(path, text.encode())


def table(rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Return the HTML of a table with a head and rows. numbers: all columns but the first hold numbers."""
    lines = []
    for index, row in enumerate(rows):
        tag = "td" if index else "th"
        cells = (
            f"<{tag}{' class=n' if numbers and place else ''}>{escape(cell)}</{tag}>" for place, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def escape(value: str) -> str:
    """Return a text with the characters that HTML reads as its own replaced."""
    return html.escape(value, quote=True)

"""One self-contained HTML file: tables, plots by plotly.js, pictures as data URLs."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from bigdet.reporting.figures import Figure
from bigdet.reporting.table import Table

LONG_CELL = 40  # longer cells, in characters, may be broken into lines
NUMBER = re.compile(r"[-+<]*[0-9]")  # a column of such cells is aligned to the right


def write_page(
    title: str,
    groups: Sequence[str],
    sections: Mapping[str, str],
    figures: Sequence[Figure],
    albums: Sequence[Mapping[str, Any]],
) -> str:
    """Return the page.

    Args:
        title: heading of the page.
        groups: names of the groups of runs, in the order of their colors.
        sections: HTML by heading; empty ones are left out.
        figures: all figures that the sections have a card for.
        albums: ``name`` and ``pictures``, each with ``truth``, ``found`` (data URLs) and ``text``.
    """
    # Imported here, where alone it is needed. MIT license, in the first lines of its script.
    from plotly.offline import get_plotlyjs

    parts = resources.files("bigdet.reporting")
    page = parts.joinpath("page.html").read_text(encoding="utf-8")
    body = "\n".join(
        f"<section><h2>{html.escape(heading)}</h2>\n{content}</section>"
        for heading, content in sections.items()
        if content
    )
    values = {
        "TITLE": html.escape(title),
        "STYLE": parts.joinpath("page.css").read_text(encoding="utf-8"),
        "LEGEND": "".join(
            f'<button type="button" data-group="{number}" aria-pressed="true"><i></i>'
            f"{html.escape(name)}</button>"
            for number, name in enumerate(groups)
        ),
        "BODY": body,
        "FIGURES": _script_json([figure.to_json() for figure in figures]),
        "PICTURES": _script_json(list(albums)),
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": parts.joinpath("page.js").read_text(encoding="utf-8"),
    }
    pieces = page.split("@")  # text, name, text, name, ...; inserted text is not searched for names
    return "".join(values.get(piece, piece) for piece in pieces)


def table_html(table: Table) -> str:
    """Return a table that scrolls sideways if it is too wide; empty without rows."""
    if not table.rows:
        return ""
    are_text = [
        any(cell and not NUMBER.match(cell) for cell in column)
        for column in zip(*table.rows, strict=True)
    ]
    head = "".join(
        f"<th{' class=text' if is_text else ''}>{html.escape(cell)}</th>"
        for cell, is_text in zip(table.header, are_text, strict=True)
    )
    rows = ""
    for row in table.rows:
        name, *cells = map(_cell, row, are_text)
        rows += f"<tr>{_breakable(name)}{''.join(cells)}</tr>\n"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>'
        f"</div>\n"
    )


def cards_html(figures: Sequence[Figure], wide: bool = False) -> str:
    """Return cards for figures, side by side if there is room; empty without figures."""
    if not figures:
        return ""
    cards = "".join(_card(figure) for figure in figures)
    return f'<div class="cards{" wide" if wide else ""}">{cards}</div>\n'


def paragraph_html(text: str, is_note: bool = False) -> str:
    """Return a paragraph; empty without text."""
    style = ' class="note"' if is_note else ""
    return f"<p{style}>{_escaped(text)}</p>\n" if text else ""


def pager_html(albums: Sequence[Mapping[str, Any]]) -> str:
    """Return the viewer of the pictures; empty without albums."""
    if not albums:
        return ""
    options = _options(album["name"] for album in albums)
    return (
        '<div class="card pager" id="pager"><div class="controls">'
        f'<select id="album" aria-label="run">{options}</select>'
        '<button type="button" id="before">Previous</button>'
        '<button type="button" id="after">Next</button>'
        '<span id="picture-text"></span></div><div class="pair">'
        '<figure><figcaption>Ground truth</figcaption><img id="truth" alt="ground truth"></figure>'
        "<figure><figcaption>Detections, scores from 0.5</figcaption>"
        '<img id="found" alt="detections"></figure></div></div>\n'
    )


def _card(figure: Figure) -> str:
    key = html.escape(figure.key)
    select = ""
    if len(figure.choices) > 1:
        options = _options(choice.label for choice in figure.choices)
        select = (
            f'<select id="choice-{key}" aria-label="{html.escape(figure.title)}">{options}</select>'
        )
    return (
        f'<div class="card"><div class="top"><h3>{html.escape(figure.title)}</h3>{select}</div>'
        f'<div class="plot" id="plot-{key}" style="height:{figure.height}px"></div>'
        f"{paragraph_html(figure.note, is_note=True)}</div>\n"
    )


def _options(names: Iterable[str]) -> str:
    return "".join(f"<option>{html.escape(name)}</option>" for name in names)


def _cell(text: str, is_text: bool) -> str:
    style = "long" if len(text) > LONG_CELL else "text" if is_text else ""
    return f"<td{f' class={style}' if style else ''}>{_escaped(text)}</td>"


def _escaped(text: str) -> str:
    """Return a text as HTML, with its line breaks."""
    return html.escape(text).replace("+-", "&plusmn;").replace("\n", "<br>")


def _breakable(cell: str) -> str:
    """Allow line breaks after the dots and underscores of an option's name."""
    return cell.replace(".", ".<wbr>").replace("_", "_<wbr>")


def _script_json(value: Any) -> str:
    """Return JSON that cannot end the script element around it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

"""Reports as one HTML file that opens from an e-mail: no scripts, no requests, prints well."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_adapters.contracts import Figure, Report, Table
from dino_adapters.runtime.files import write_text
from dino_adapters.runtime.lookup import need

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

TEMPLATE = "report.html.j2"


def render(report: Report) -> str:
    """The page as text.

    Words are escaped; only the markup of figures is taken as it is.

    Raises:
        MissingLibraryError: Jinja2 is absent.
        ValueError: a figure would run code or load something from elsewhere.
    """
    jinja2 = need("jinja2", extra="report")
    for figure in report.figures:
        _refuse_requests(figure)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )
    page = environment.get_template(TEMPLATE).render(
        report=report, provenance=_plain(report.provenance), numeric=_is_numeric
    )
    return page.rstrip() + "\n"


def write_page(report: Report, path: Path) -> Path:
    """Writes the page atomically and returns its path; raises as `render` does."""
    write_text(path, render(report))
    return path


def terminal_table(table: Table) -> TerminalTable:
    """The table for a terminal: the first column left, numbers right, the note underneath."""
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(
        title=Text(table.title),
        caption=Text(table.note) if table.note else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    columns = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.header)
    for index, (name, cells) in enumerate(zip(table.header, columns, strict=True)):
        right = index > 0 and all(_is_numeric(cell) for cell in cells)
        # Text, not str: a class called '[red]' must not colour the terminal.
        drawn.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _template(name: str) -> str:
    return (resources.files("dino_adapters.study") / "templates" / name).read_text("utf-8")


class _Requests(HTMLParser):
    """Finds what would run code or ask a server. Figures are ours: this guards against mistakes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form"):
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            here = (value or "").strip()
            elsewhere = name in ("src", "href", "xlink:href", "srcset") and not here.startswith(
                ("data:image/", "#")
            )
            if elsewhere or name.startswith("on") or _fetches(here if name == "style" else ""):
                self.found.append(f"{name}={here[:40]}")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style" and _fetches(data):
            self.found.append("a style sheet that loads a file")


def _fetches(style: str) -> bool:
    return bool(re.search(r"@import|url\((?!\s*[\"']?#)", style, re.IGNORECASE))


def _refuse_requests(figure: Figure) -> None:
    parser = _Requests()
    parser.feed(figure.markup)
    parser.close()
    if parser.found:
        raise ValueError(
            f"The figure '{figure.title}' holds {parser.found[0]}, which could run code or load "
            "from elsewhere. Figures hold inline SVG, or images as data: addresses."
        )


def _plain(values: Mapping[str, Any]) -> dict[str, str]:
    """Provenance as text: long structures become indented JSON."""
    return {
        key: value
        if isinstance(value, str)
        else json.dumps(value, indent=2, ensure_ascii=False, default=str)
        for key, value in values.items()
    }


def _is_numeric(cell: str) -> bool:
    return bool(
        re.fullmatch(
            r"[-+−]?[\d.,]+(?:e[-+]?\d+)?(?: ?[%×]| ?±.*| \(.*\)| to .*)?|–|", cell.strip()
        )
    )

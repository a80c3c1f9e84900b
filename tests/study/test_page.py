"""The page: complete, self-contained, safe with hostile words; and tables for a terminal."""

from html.parser import HTMLParser

import pytest
from rich.console import Console

from dino_adapters.contracts import Figure, Report, Table
from dino_adapters.study.page import _is_numeric, render, terminal_table, write_page


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def report(**changes):
    words = {
        "title": "It helped & <b>how</b>",
        "summary": ("Row a beats row b.",),
        "tables": (Table("Numbers", ("", "1-shot"), (("row <a>", "67.7 ± 2.1"),), "A note."),),
        "figures": (Figure("A chart.", "Caption.", "<svg viewBox='0 0 1 1'></svg>"),),
        "notes": ("2 files skipped",),
        "provenance": {"command": "dino-adapters start --out runs/a", "recipe": {"seed": 0}},
    }
    return Report(**(words | changes))


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open, "every tag is closed"
    return reader


def test_the_page_holds_everything():
    reader = read(render(report()))
    text = " ".join(reader.text)
    for words in ("Row a beats row b.", "67.7 ± 2.1", "A note.", "A chart.", "Caption.",
                  "2 files skipped", "dino-adapters start --out runs/a", '"seed": 0'):  # fmt: skip
        assert words in text
    assert reader.tags.count("svg") == 1


def test_words_are_escaped():
    page = render(report())
    assert "It helped &amp; &lt;b&gt;how&lt;/b&gt;" in page
    assert "row &lt;a&gt;" in page
    assert "<b>" not in page


def test_the_page_asks_nobody():
    reader = read(render(report()))
    assert "script" not in reader.tags
    for name, value in reader.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:", "#"))


@pytest.mark.parametrize(
    "markup",
    [
        "<script>alert(1)</script>",
        '<img src="https://example.org/a.png">',
        '<svg><image xlink:href="http://example.org/a.png"/></svg>',
        '<img src="data:image/png;base64,AA" onload="x()">',
        '<div style="background: url(http://example.org)"></div>',
        "<style>@import 'a.css';</style>",
    ],
)
def test_figures_that_run_code_or_load_are_refused(markup):
    with pytest.raises(ValueError, match="Figures hold inline SVG"):
        render(report(figures=(Figure("A chart.", "", markup),)))


@pytest.mark.parametrize(
    "markup",
    [
        '<img alt="a class called src=b" src="data:image/png;base64,AA">',
        '<svg xmlns="http://www.w3.org/2000/svg"><use href="#a"/></svg>',
        '<g style="clip-path: url(#a)"></g>',
    ],
)
def test_harmless_figures_pass(markup):
    assert markup in render(report(figures=(Figure("A chart.", "", markup),)))


def test_an_empty_report_is_a_page():
    bare = report(summary=(), tables=(), figures=(), notes=(), provenance={})
    reader = read(render(bare))
    assert "table" not in reader.tags


def test_written_whole(tmp_path):
    path = write_page(report(), tmp_path / "report" / "index.html")
    assert path.read_text(encoding="utf-8") == render(report())
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]


def test_the_template_is_in_the_package():
    from importlib import resources

    folder = resources.files("dino_adapters.study") / "templates"
    assert (folder / "report.html.j2").is_file()


def test_a_missing_library_names_the_command(monkeypatch):
    import sys

    from dino_adapters.contracts import MissingLibraryError

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'dino-adapters\[report\]'"):
        render(report())


@pytest.mark.parametrize(
    ("cell", "numeric"),
    [
        ("67.7 ± 2.1", True),
        ("-4.1", True),
        ("1e-06", True),
        ("1,260", True),
        ("12 %", True),
        ("3.0 to 5.2", True),
        ("", True),
        ("vitmicro8", False),
        ("173 images", False),
    ],
)
def test_numbers_are_told_from_words(cell, numeric):
    assert _is_numeric(cell) is numeric


def test_terminal_tables_do_not_read_markup():
    table = Table("Title", ("", "value"), (("[red]class[/red]", "1.0"),), "Note [bold].")
    console = Console(width=60, file=None, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(terminal_table(table))
    for words in ("[red]class[/red]", "Note [bold].", "Title"):
        assert words in captured.get()

"""Charts as inline SVG: loss curves, few-shot accuracy, accuracy over time.

Colours are CSS variables that the page defines for light and dark, with a fallback for pictures
that stand alone. The palette is Okabe and Ito's, which colour-blind readers can tell apart; line
style or marker says the same once more. Equal inputs give equal bytes.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_adapters.contracts import DataError, Figure
from dino_adapters.runtime.lookup import need

if TYPE_CHECKING:
    from dino_adapters.study.shot_table import FewShotTable

# Matplotlib cannot write CSS variables: it draws in the left colours, `_inline` swaps the right
# ones in.
PALETTE = {
    "#0072b2": "var(--series-1, #0072b2)",
    "#d55e00": "var(--series-2, #d55e00)",
    "#009e73": "var(--series-3, #009e73)",
    "#cc79a7": "var(--series-4, #cc79a7)",
    "#e69f00": "var(--series-5, #e69f00)",
    "#56b4e9": "var(--series-6, #56b4e9)",
}
_INK, _FAINT = "#010203", "#040506"
_SWAPS = {**PALETTE, _INK: "var(--ink, #1f2328)", _FAINT: "var(--grid, #c9ced6)"}
_COLOURS = tuple(PALETTE)
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dino-adapters",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_TERMS = {
    "loss": "whole loss",
    "dino_global": "DINO, global crops",
    "dino_local": "DINO, local crops",
    "ibot": "iBOT, masked patches",
    "koleo": "KoLeo, spread",
    "kde": "KDE, spread",
    "sigreg": "SIGReg, spread",
    "gram": "Gram",
    "anchor": "anchor, class tokens",
    "cls": "class token",
    "patches": "patch tokens",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One of several small charts.

    Attributes:
        title: What is drawn, with its unit.
        lines: Name -> points `(x, y)`, or `(x, y, low, high)` with a band, in ascending x.
        levels: Name -> height of a dotted line across, in the colour of the line of that name.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, ...]]]
    levels: Mapping[str, float] = field(default_factory=dict)


def loss_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str | None = None
) -> Figure:
    """How every term of the loss went, a panel a term, a line a run.

    Args:
        runs: Name -> rows of `metrics.jsonl`; terms that a run lacks are left out.
        title: Sentence above the picture; None writes one.

    Raises:
        DataError: no run has two rows with a loss.
        MissingLibraryError: matplotlib is absent.
    """
    curves = {name: kept for name, rows in runs.items() if len(kept := _with_loss(rows)) > 1}
    if not curves:
        raise DataError("There are fewer than two rows with a loss, so there is no curve to draw.")
    there = {
        term for rows in curves.values() for row in rows for term in row if _is_number(row[term])
    }
    terms = {term: title for term, title in _TERMS.items() if term in there}
    guides = sorted(term for term in there if term.startswith("guide/"))
    terms |= {term: f"guide, {term.removeprefix('guide/')}" for term in guides}
    columns = min(len(terms), 3)
    lines = -(-len(terms) // columns)
    with _style():
        figure = _canvas(2.9 * columns, 2.2 * lines + 0.5)
        grid = figure.subplots(lines, columns, squeeze=False)
        for panel in grid.flat[len(terms) :]:
            panel.remove()
        for panel, (term, heading) in zip(grid.flat, terms.items(), strict=False):
            panel.set_title(heading)
            panel.set_xlabel("images seen")
            for index, (name, rows) in enumerate(curves.items()):
                x, y = _series(rows, term)
                if not len(y):
                    continue
                colour = _COLOURS[index % len(_COLOURS)]
                if len(y) > 20:
                    panel.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
                    y = _smooth(y)
                line = _LINES[index % len(_LINES)]
                panel.plot(x, y, color=colour, linestyle=line, linewidth=1.6, label=name)
        if len(curves) > 1:
            handles, names = grid.flat[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower left", ncols=len(names))
        falls = [_fall(name, rows, alone=len(curves) == 1) for name, rows in curves.items()]
        return _finish(
            figure,
            title or "; ".join(falls) + ".",
            "Thin: each note. Thick: a running mean. Terms a network cannot have are left out.",
        )


def shot_chart(table: FewShotTable, *, title: str | None = None) -> Figure:
    """Mean balanced accuracy of every row and shot count, with the 95 % interval over draws.

    Args:
        table: What was measured.
        title: Sentence above the picture; None writes one.
    """
    rows = table.rows
    with _style():
        figure = _canvas(5.8, 0.55 * len(rows) + 1.1)
        panel = figure.subplots()
        spread = np.linspace(-0.22, 0.22, len(table.shots)) if len(table.shots) > 1 else [0.0]
        for index, shot in enumerate(table.shots):
            values = np.array([table.interval(row, shot) for row in rows]) * 100
            panel.errorbar(
                values[:, 0],
                np.arange(len(rows)) + spread[index],
                xerr=np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]).clip(0),
                fmt=_MARKERS[index % len(_MARKERS)],
                markersize=5,
                linewidth=1.4,
                color=_COLOURS[index % len(_COLOURS)],
                label=f"{shot}-shot",
            )
        panel.axvline(100 * table.chance, color=_INK, linewidth=0.8, linestyle=":", label="chance")
        panel.set_yticks(np.arange(len(rows)), rows)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set_xlabel("balanced accuracy in %")
        panel.set_xlim(left=0)
        figure.legend(loc="outside lower left", ncols=len(table.shots) + 1)
        best = max(rows, key=table.mean)
        return _finish(
            figure,
            title or f"Highest with few labels, on average: {best}.",
            f"Marker: mean of {table.draws} draws of the labelled images. Bar: 95 % interval over "
            f"the draws. {len(table.query_labels)} {table.part} images.",
        )


def accuracy_over_time(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    *,
    unit: str = "seconds of training",
    floors: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Accuracy of a network while it trains.

    Args:
        curves: Name -> points `(time, mean, low, high)` in ascending time; accuracies in [0, 1].
        unit: What time is counted in.
        floors: Name -> accuracy of something that does not train, drawn as a level line.
        title: Sentence above the picture; None writes one.

    Raises:
        DataError: there is no point.
    """
    if not any(curves.values()):
        raise DataError("There is no accuracy to draw over time. Keep snapshots while training.")
    with _style():
        figure = _canvas(5.8, 3.2)
        panel = figure.subplots()
        for index, (name, points) in enumerate(curves.items()):
            time, mean, low, high = np.array(points, dtype=float).reshape(-1, 4).T
            colour = _COLOURS[index % len(_COLOURS)]
            panel.fill_between(time, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
            panel.plot(
                time,
                100 * mean,
                color=colour,
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4,
                linestyle=_LINES[index % len(_LINES)],
                label=name,
            )
        for index, (name, level) in enumerate((floors or {}).items()):
            line = _LINES[(index + 1) % 4]
            panel.axhline(100 * level, color=_INK, linewidth=0.9, linestyle=line, label=name)
        panel.set_xlabel(unit)
        panel.set_ylabel("balanced accuracy in %")
        figure.legend(loc="outside lower left", ncols=2)
        return _finish(
            figure, title or "Accuracy while training.", "Band: 95 % interval over the draws."
        )


def small_multiples(
    panels: Sequence[Panel], *, unit: str, title: str, caption: str, columns: int = 3
) -> Figure:
    """Several small charts over the same axis.

    Args:
        panels: The charts, row by row.
        unit: What the horizontal axis counts.
        title: Sentence above the picture.
        caption: What good looks like, and what the lines are.
        columns: Charts side by side, at most.

    Raises:
        DataError: there is no panel.
    """
    if not panels:
        raise DataError("There is nothing to draw. Give at least one chart with a point in it.")
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    with _style():
        figure = _canvas(2.9 * columns, 2.1 * lines)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for place in grid.flat[len(panels) :]:
            place.remove()
        for index, (place, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            _draw_panel(place, panel)
            if index + columns >= len(panels):  # nothing stands below it
                place.set_xlabel(unit)
                place.tick_params(labelbottom=True)
        return _finish(figure, title, caption)


def _draw_panel(place: Any, panel: Panel) -> None:
    place.set_title(panel.title)
    colours = dict(zip(panel.lines, itertools.cycle(_COLOURS), strict=False))
    for index, (name, points) in enumerate(panel.lines.items()):
        colour = colours[name]
        x, y, *band = np.array(points, dtype=float).T
        if band:
            place.fill_between(x, band[0], band[1], color=colour, alpha=0.18, linewidth=0)
        line, marker = _LINES[index % len(_LINES)], _MARKERS[index % len(_MARKERS)]
        look = {"linestyle": line, "linewidth": 1.6, "marker": marker, "markersize": 3.5}
        place.plot(x, y, color=colour, label=name, **look)
    for name, level in panel.levels.items():
        label = "_" if name in colours else name
        place.axhline(level, color=colours.get(name, _INK), linewidth=1, linestyle=":", label=label)
    if len({*panel.lines, *panel.levels}) > 1:
        place.legend(loc="best", fontsize=7.5, handlelength=1.8)


def _style() -> Any:
    """Our look, for as long as a chart is drawn and written."""
    return need("matplotlib", extra="report").rc_context(_STYLE)


def _canvas(width: float, height: float) -> Any:
    """An empty figure, in inches; no window system and no global list of figures is touched."""
    figure = need("matplotlib.figure", extra="report").Figure((width, height), layout="constrained")
    need("matplotlib.backends.backend_svg", extra="report").FigureCanvasSVG(figure)
    return figure


def _finish(figure: Any, title: str, caption: str) -> Figure:
    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return Figure(title, caption, _inline(written.getvalue(), title))


def _inline(svg: str, title: str) -> str:
    """The `<svg>` element alone, fit to stand in a page beside others."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for drawn, wanted in _SWAPS.items():
        svg = re.sub(re.escape(drawn), wanted, svg, flags=re.IGNORECASE)
    svg = re.sub(r"'[^']*', *|\b(?:DejaVu|Bitstream)[\w ]*, *", "", svg)
    mark = re.sub(r"\W+", "-", title.lower()).strip("-")[:40]
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}-", svg)
    # Without width and height the picture follows the width of the page, within what its letters
    # bear; on a phone a wider one scrolls.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    wide = float(head.split('viewBox="')[1].split()[2])
    head += f' style="max-width: {1.7 * wide:.0f}px; min-width: {0.8 * wide:.0f}px"'
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'.strip()


def _with_loss(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if _is_number(row.get("loss")) and _is_number(row.get("images"))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value


def _series(rows: Sequence[Mapping[str, Any]], term: str) -> tuple[np.ndarray, np.ndarray]:
    kept = [(row["images"], row[term]) for row in rows if _is_number(row.get(term))]
    pairs = np.array(kept, dtype=float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a twentieth of the run, shorter at the ends, never padded."""
    half = max(len(values) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), half)
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def _fall(name: str, rows: Sequence[Mapping[str, Any]], *, alone: bool) -> str:
    losses = np.array([row["loss"] for row in rows], dtype=float)
    part = max(len(losses) // 20, 1)
    first, last = losses[:part].mean(), losses[-part:].mean()
    verb = "fell" if last < first else "rose"
    who = "The loss" if alone else f"{name}: the loss"
    return f"{who} {verb} from {first:.2f} to {last:.2f} over {rows[-1]['images']:,} images"

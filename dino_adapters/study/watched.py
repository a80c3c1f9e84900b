"""What the looks of a run say: small charts, a table, findings, skipped steps and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dino_adapters.backbones.card import CARD, exports_below
from dino_adapters.contracts import DataError, Figure, Table
from dino_adapters.pretrain.diagnosis import diagnose
from dino_adapters.pretrain.gate import GATE
from dino_adapters.pretrain.health import dead_level
from dino_adapters.pretrain.rows import PREFIX, is_look, steps_of
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.figures import Panel, small_multiples

SHARED = ("watch", "guide")
"""First parts of keys `PART/TERM` that are no student's name."""
SHOWN = 5
CAPTION = (
    "Dotted: the start; with entropies, log K too. Good: probes and RankMe rise; class tokens of "
    "different images come apart; one image keeps to few prototypes while all images together use "
    "many; few prototypes have a twin; similarity maps go on agreeing, and the class token does "
    "not move towards its patches. Read from the teacher; all but the probes without labels. One "
    "part of the labelled images chooses reading size and best look, another one judges. "
    "Compare with the run's own start: levels of other networks and data differ."
)


@dataclass(frozen=True, slots=True)
class Sign:
    """A number of a look.

    Attributes:
        key: Its name behind `watch/`.
        words: What it is, beside others of its chart.
        good: What is good.
        percent: Whether it is a share, shown in percent.
        digits: Behind the point, in the table.
    """

    key: str
    words: str
    good: str
    percent: bool = False
    digits: int = 2

    @property
    def subject(self) -> str:
        """Its words without what they are there for."""
        return self.words.partition(",")[0]

    def value(self, look: Mapping[str, Any], end: str = "") -> float | None:
        """The number as it is shown, or an end (`_low`, `_high`) of its interval; None without."""
        value = look.get(self.key + end)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return 100.0 * value if self.percent else float(value)


LABELLED, RANK = "labelled images, balanced accuracy in %", "RankMe"
CHARTS = {
    LABELLED: (
        Sign("knn", "k-NN, to judge by", "rises", percent=True, digits=1),
        Sign("linear", "linear probe, to judge by", "rises", percent=True, digits=1),
        Sign("selection", "both, to choose by", "rises", percent=True, digits=1),
    ),
    "probes to judge by, less the start, in points": (
        Sign("gain", "mean of both", "its interval is above 0", percent=True, digits=1),
    ),
    RANK: (Sign("rankme", "RankMe", "rises, or holds", digits=1),),
    "cosine of class tokens": (
        Sign("cls_cosine", "with other images", "falls well below 1", digits=3),
        Sign("cls_patch_cosine", "with own patches", "does not climb", digits=3),
    ),
    "similarity maps, image and mirror image": (
        Sign("patch_consistency", "agreement", "holds", digits=3),
    ),
    "entropy of assignments in nats": (
        Sign("row_entropy", "of one image", "falls well below log K"),
        Sign("marginal_entropy", "of all images", "stays near log K"),
    ),
    "prototypes in use": (
        Sign("prototypes_used", "first choice of an image", "does not fall to a few", digits=0),
    ),
    "prototypes with a twin in %": (
        Sign("prototypes_duplicated", "cosine above 0.975", "stays low", percent=True, digits=1),
    ),
}


@dataclass(frozen=True, slots=True)
class Watched:
    """Parts of a report.

    Attributes:
        alarms: Findings for its top: a collapse, or probes that fell below the start.
        tables: Signs at the start and at the end.
        figures: Signs over time.
        notes: Other findings, and skipped steps.
    """

    alarms: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


def watched(
    folder: RunFolder,
    recipe: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str = "",
) -> Watched:
    """Chart, table and findings of one run or phase; with fewer than two looks, findings alone.

    Args:
        folder: Where it lives, for the number of images that its export names.
        recipe: What it was told, resolved.
        rows: Of `metrics.jsonl`.
        name: Put before titles and sentences, where a page tells of several.

    Raises:
        MissingLibraryError: matplotlib is absent.
    """
    facts = _facts(folder, recipe)
    steps = by_student(name, [dict(row) for row in rows if not is_look(row)])
    shared = [row for row in rows if is_look(row)]
    if len(steps) > 1:  # looks that name no student are shown once, and not with each
        parts: dict[str, Sequence[Mapping[str, Any]]] = {name: shared, **steps}
    else:
        parts = {title: rows for title in steps}
    alarms, tables, figures, notes = [], [], [], []
    for title, own in parts.items():
        before = f"{title}: " if title else ""
        looks = looks_of(own)
        if panels := _panels(looks, facts["prototypes"]):
            tables.append(_table(looks, before))
            figures.append(_figure(panels, looks, before))
        for finding in diagnose(looks, steps_of(own), **facts):
            where = alarms if finding.is_alarm else notes
            where.append(before + finding.sentence)
    before = f"{name}: " if name else ""
    notes += [before + sentence for sentence in skipped(rows)]
    return Watched(tuple(alarms), tuple(tables), tuple(figures), tuple(notes))


def looks_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that hold a look, their keys without `watch/`."""
    return [
        {key.removeprefix(PREFIX): value for key, value in row.items()}
        for row in rows
        if is_look(row)
    ]


def skipped(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Which steps were left out, in a sentence; nothing if none was."""
    steps = [f"{row['step']:,}" for row in rows if row.get("skipped")]
    if not steps:
        return ()
    shown = ", ".join(steps[:SHOWN]) + (", …" if len(steps) > SHOWN else "")
    if len(steps) == 1:
        return (f"Step {shown} was left out, as its loss or gradient was not finite.",)
    return (f"{len(steps)} steps were left out, as loss or gradient was not finite: {shown}.",)


def verdict(folder: RunFolder) -> tuple[str, ...]:
    """What the gate said, if there was one.

    Raises:
        DataError: its file cannot be read.
    """
    path = folder.path / GATE
    if not path.exists():
        return ()
    try:
        return (str(json.loads(path.read_text(encoding="utf-8"))["sentence"]),)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}). Run the pretraining again with --resume."
        ) from error


def by_student(name: str, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a phase; those of a distillation, whose terms are `STUDENT/TERM`, once a student."""
    first = {key.split("/")[0] for row in rows for key in row if "/" in key}
    students = sorted(first.difference(SHARED))
    if not students:
        return {name: rows}
    before = f"{name}: " if name else ""
    return {
        before + student: [
            {key.removeprefix(f"{student}/"): value for key, value in row.items()} for row in rows
        ]
        for student in students
    }


def _facts(folder: RunFolder, recipe: Mapping[str, Any]) -> dict[str, int]:
    """What `diagnose` must know of the run; 0 for what the recipe does not tell."""
    crops, optim, schedule, objective = (
        recipe.get(section, {}) for section in ("crops", "optim", "schedule", "objective")
    )
    return {
        "prototypes": objective.get("prototypes", 0) if objective.get("dino_weight") else 0,
        "rows": crops.get("global_count", 0) * optim.get("batch_size", 0),
        "images": _images(folder),
        "frozen_until": round(schedule.get("freeze_backbone", 0.0) * recipe.get("steps", 0)),
    }


def _images(folder: RunFolder) -> int:
    """How many images the run read, by its export's card; 0 before there is one."""
    for export in (folder.export, *exports_below(folder.export)):
        card = export / CARD
        if card.exists():
            try:
                return int(json.loads(card.read_text(encoding="utf-8"))["training"]["images"])
            except (ValueError, KeyError, TypeError):
                return 0  # an export of other hands: rules that need the number do without
    return 0


def _panels(looks: Sequence[Mapping[str, Any]], prototypes: int) -> list[Panel]:
    """A chart for each group of signs that was seen after the start."""
    panels = []
    for title, signs in CHARTS.items():
        lines: dict[str, Sequence[tuple[float, ...]]] = {}
        levels: dict[str, float] = {}
        for sign in signs:
            points = _points(sign, looks)
            if not points or points[-1][0] <= looks[0]["step"]:
                continue
            lines[sign.words] = points
            if (start := sign.value(looks[0])) is not None:
                levels[sign.words] = start
            elif sign.key == "gain":
                levels[sign.words] = 0.0
            if sign.key == "marginal_entropy" and prototypes:
                levels["log K"] = dead_level(prototypes)
        if lines:
            panels.append(Panel(title, lines, levels))
    return panels


def _points(sign: Sign, looks: Sequence[Mapping[str, Any]]) -> list[tuple[float, ...]]:
    """A sign over steps, with its interval where all looks that have it have one."""
    points, ends = [], []
    for look in looks:
        value = sign.value(look)
        if value is not None:
            points.append((float(look["step"]), value))
            ends.append((sign.value(look, "_low"), sign.value(look, "_high")))
    if any(end is None for pair in ends for end in pair):
        return points
    return [(*point, *pair) for point, pair in zip(points, ends, strict=True)]


def _figure(panels: list[Panel], looks: Sequence[Mapping[str, Any]], before: str) -> Figure:
    """All charts, under what became of the probes, or of RankMe where nothing is labelled."""
    changes = [
        f"{sign.subject} from {start:.1f} to {end:.1f}{' %' if sign.percent else ''}"
        for title in (LABELLED, RANK)
        for sign in CHARTS[title]
        if (start := sign.value(looks[0])) is not None
        and (end := sign.value(looks[-1])) is not None
    ]
    said = f"The looks saw {' and '.join(changes[:2])}." if changes else "What the looks saw."
    return small_multiples(panels, unit="steps", title=before + said, caption=CAPTION)


def _table(looks: Sequence[Mapping[str, Any]], before: str) -> Table:
    """Every sign at the start and in the last look, with what is good."""
    rows = tuple(
        (
            f"{title}: {sign.words}" if len(signs) > 1 else title,
            *(_shown(sign, look) for look in (looks[0], looks[-1])),
            sign.good,
        )
        for title, signs in CHARTS.items()
        for sign in signs
        if sign.value(looks[-1]) is not None
    )
    first, last = (f"step {look['step']:,}" for look in (looks[0], looks[-1]))
    return Table(f"{before}Signs of health", ("", first, last, "good"), rows)


def _shown(sign: Sign, look: Mapping[str, Any]) -> str:
    value, *ends = (sign.value(look, end) for end in ("", "_low", "_high"))
    if value is None:
        return ""
    interval = " to ".join(f"{end:+.{sign.digits}f}" for end in ends if end is not None)
    return f"{value:+.{sign.digits}f} ({interval})" if interval else f"{value:,.{sign.digits}f}"

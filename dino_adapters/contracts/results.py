"""What heads and evaluations hand over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Class scores of a batch: scores `(B, K)`, keys of length B, class_names of length K."""

    scores: np.ndarray
    keys: tuple[str, ...]
    class_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One number with its 95 % interval.

    Attributes:
        name: E.g. `balanced_accuracy`.
        value: Point estimate.
        low: Lower end of the interval; equals `value` where no interval can be had.
        high: Upper end.
        count: Number of units behind it.
        unit: What was resampled or averaged: `images`, `groups` or `seeds`.
        split: `train`, `val` or `test`.
    """

    name: str
    value: float
    low: float
    high: float
    count: int
    unit: str
    split: str = "test"


@dataclass(frozen=True, slots=True)
class Figure:
    """One picture of a report: inline SVG or a `data:` image, with its caption."""

    title: str
    caption: str
    markup: str


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a report: header, rows of text, and a sentence under it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A page: what was found, in sentences, tables and figures, and where it came from."""

    title: str
    summary: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

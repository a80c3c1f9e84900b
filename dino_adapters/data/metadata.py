"""What a table tells of images beside labels: classes and numbers, for guides of pretraining."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dino_adapters.contracts import DataError, UnknownNameError
from dino_adapters.data.labels import PATH_COLUMNS, bases_of, key_of, read_table
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.lookup import nearest

Kind = Literal["classes", "numbers"]
ENTANGLED = 0.5
"""Two columns that tell more than this share of each other should not be pulled apart."""
TENTHS = 10
LARGEST = 1e300  # beyond it a range of two numbers may exceed what a float64 holds
READ_AS_MISSING = frozenset({"na", "n/a", "nan", "none", "null", "unknown", "-", "?"})

Row = tuple[int, Mapping[str, str]]
"""A line of the table, counted from 1 with the header, and its cells."""


@dataclass(frozen=True, slots=True)
class Classes:
    """A column of class names.

    Attributes:
        names: the classes, sorted.
        codes: int64 `(N,)`, for each image the place of its class in `names`; -1 without a value.
    """

    names: tuple[str, ...]
    codes: np.ndarray


@dataclass(frozen=True, slots=True)
class Numbers:
    """A column of numbers, scaled so that the smallest is 0 and the largest 1.

    Attributes:
        values: float32 `(N,)` in [0, 1]; NaN without a value.
        low: what 0 means, in the table's own unit.
        high: what 1 means.
    """

    values: np.ndarray
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Metadata:
    """Columns of a table, aligned with the keys of the images.

    Attributes:
        keys: the images.
        columns: what is known of them, by the column's name.
    """

    keys: tuple[str, ...]
    columns: Mapping[str, Classes | Numbers]

    def column(self, name: str) -> Classes | Numbers:
        """The column of this name.

        Raises:
            UnknownNameError: it was not read.
        """
        if name in self.columns:
            return self.columns[name]
        hint = nearest(name, self.columns)
        raise UnknownNameError(f"There is no metadata column '{name}'. {hint}")

    def without(self, keys: Collection[str]) -> Metadata:
        """The same, nothing being known of these images."""
        gone = np.array([key in set(keys) for key in self.keys], dtype=bool)
        columns: dict[str, Classes | Numbers] = {}
        for name, column in self.columns.items():
            if isinstance(column, Classes):
                columns[name] = replace(column, codes=np.where(gone, -1, column.codes))
            else:
                values = np.where(gone, np.float32(np.nan), column.values)
                columns[name] = replace(column, values=values)
        return Metadata(self.keys, columns)

    def classes(self) -> dict[str, int]:
        """How many classes each column of classes has."""
        return {n: len(c.names) for n, c in self.columns.items() if isinstance(c, Classes)}


def read_metadata(
    path: str | Path,
    root: Path,
    keys: Sequence[str],
    columns: Mapping[str, Kind],
    *,
    notices: Notices | None = None,
) -> Metadata:
    """Reads columns of a CSV for these images; absent rows and empty cells are missing values.

    Messages name lines and columns, never cells: these may tell of patients.

    Args:
        path: a table with the column `path`, relative to `root` or to the table, or absolute.
        root: folder that keys are relative to.
        keys: keys of the images.
        columns: names of the columns, each with how it is read.
        notices: counts rows without an image and images without a value.

    Raises:
        DataError: a column is absent, contradicts itself, holds text where numbers are wanted, or
            tells nothing: one value for all images, or a class of its own for each.
    """
    table = Path(path).expanduser()
    notices = Notices() if notices is None else notices
    rows = list(enumerate(read_table(table, notices=notices), start=2))
    _check_columns(table, rows, columns)
    known, bases = frozenset(keys), bases_of(table, root)
    found: dict[str, list[Row]] = {}
    lost = []
    for line, row in rows:
        key = key_of(row["path"], known, bases)
        if key is None:
            lost.append(row["path"])
        else:
            found.setdefault(key, []).append((line, row))
    if not found:
        held = f"'{keys[0]}'" if keys else "no images"
        raise DataError(
            f"No row of {table} names an image below {root}: the table says '{lost[0]}', and there "
            f"is {held}. Write paths relative to that folder or to the table."
        )
    if lost:
        what = f"{len(lost)} of {len(rows)} rows of the metadata table have no image here"
        notices.add(what, lost[0], len(lost))
    read: dict[str, Classes | Numbers] = {}
    for name, kind in columns.items():
        where = f"column '{name}' of {table}"
        cells = _cells(where, found, name)
        make = _classes if kind == "classes" else _numbers
        read[name] = make(where, cells, keys, notices)
        missing = [key for key in keys if key not in cells]
        if missing:
            what = f"{len(missing)} of {len(keys)} images have no value in the column '{name}'"
            notices.add(what, missing[0], len(missing))
    return Metadata(tuple(keys), read)


def _check_columns(table: Path, rows: Sequence[Row], columns: Collection[str]) -> None:
    if not rows:
        raise DataError(f"{table} has a header and no rows. Add a row for each image.")
    header = [name for name in rows[0][1] if name not in PATH_COLUMNS]
    for name in columns:
        if name not in header:
            hint = nearest(name, header) if header else "It has none beside the path."
            raise DataError(f"{table} has no column '{name}'. {hint}")


def _cells(where: str, found: Mapping[str, Sequence[Row]], name: str) -> dict[str, tuple[int, str]]:
    """Line and text of the cell of each image that has one."""
    cells: dict[str, tuple[int, str]] = {}
    for key, rows in found.items():
        for line, row in rows:
            text = row[name].strip()
            if not text:
                continue
            first, before = cells.setdefault(key, (line, text))
            if before != text:
                raise DataError(
                    f"Lines {first} and {line} give {key} different values in {where}. Keep one "
                    "row an image."
                )
    if not cells:
        raise DataError(f"No image has a value in {where}. Fill it, or leave the column out.")
    return cells


def _classes(
    where: str, cells: Mapping[str, tuple[int, str]], keys: Sequence[str], notices: Notices
) -> Classes:
    names = tuple(sorted({text for _, text in cells.values()}))
    _check_varies(where, len(names), len(cells))
    if len(names) == len(cells):
        raise DataError(
            f"Every one of {len(cells)} images has a value of its own in {where}, so no two are "
            "alike. Name a column of classes, or read it as numbers with kind=regression."
        )
    for name in names:
        if name.lower() in READ_AS_MISSING:
            notices.add(
                f"classes in {where} that read like missing values; empty their cells", name
            )
    place = {name: code for code, name in enumerate(names)}
    codes = [place[cells[key][1]] if key in cells else -1 for key in keys]
    return Classes(names, np.asarray(codes, dtype=np.int64))


def _numbers(
    where: str, cells: Mapping[str, tuple[int, str]], keys: Sequence[str], _: Notices
) -> Numbers:
    wrong = [line for line, text in cells.values() if _number(text) is None]
    if wrong:
        raise DataError(
            f"Line {min(wrong)} holds no number in {where} ({len(wrong)} of {len(cells)} cells do "
            "not). Write numbers with a point, leave unknown ones empty, or read the column as "
            "classes."
        )
    numbers = {key: _number(text) for key, (_, text) in cells.items()}
    values = np.asarray([numbers.get(key, math.nan) for key in keys], dtype=np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    _check_varies(where, 1 if low == high else 2, len(cells))
    return Numbers(((values - low) / (high - low)).astype(np.float32), low, high)


def _number(text: str) -> float | None:
    """The finite number that a cell holds; `float` alone would also take `nan` and `1_000`."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= LARGEST and "_" not in text else None


def _check_varies(where: str, distinct: int, images: int) -> None:
    if distinct < 2:
        raise DataError(
            f"All {images} images with a value have the same one in {where}, so it tells nothing. "
            "Leave the column out."
        )


def uncertainty(y: Classes, x: Classes) -> float:
    """The uncertainty coefficient `U(Y|X) = I(X; Y) / H(Y)` (Theil's U).

    The share of what there is to know of an image's class in Y that its class in X tells, over
    images that have both. Not symmetric: a scanner's serial number tells its maker, not the other
    way. With few images for many classes it comes out too high: two unrelated columns of n images
    with a and b classes have about `(a - 1)(b - 1) / (2 n H(Y))`.

    Args:
        y: what is told.
        x: what tells; of the same images.

    Returns:
        0 (nothing; also where Y does not vary) to 1 (all).
    """
    both = (y.codes >= 0) & (x.codes >= 0)
    ours, theirs = y.codes[both], x.codes[both]
    alone = _entropy(ours)
    if alone == 0.0:
        return 0.0
    shared = alone + _entropy(theirs) - _entropy(ours * max(len(x.names), 1) + theirs)
    return min(max(shared / alone, 0.0), 1.0)


def entangled(
    metadata: Metadata, effects: Mapping[str, Literal["attract", "repel"]]
) -> tuple[str, ...]:
    """A sentence for each repelled column that is entangled with an attracted one.

    What the two share cannot be shown and hidden at once. FINO (arXiv 2606.05107) attracts
    entangled factors or leaves them out, and never repels them alone. Numbers are compared by
    their tenths: ten classes of about equally many images.

    Args:
        metadata: the columns.
        effects: what is asked of each column.
    """
    sentences = []
    for hidden, shown in itertools.product(effects, effects):
        if (effects[hidden], effects[shown]) != ("repel", "attract"):
            continue
        a, b = _as_classes(metadata.column(shown)), _as_classes(metadata.column(hidden))
        lost, kept = uncertainty(a, b), uncertainty(b, a)
        if max(lost, kept) > ENTANGLED:
            sentences.append(
                f"The repelled column '{hidden}' tells {lost:.0%} of the attracted column "
                f"'{shown}', which tells {kept:.0%} of it; above {ENTANGLED:.0%} the two guides "
                f"work against each other. Leave '{hidden}' out, or let it attract, too."
            )
    return tuple(sentences)


def _entropy(codes: np.ndarray) -> float:
    """Entropy of the classes in nats; 0 without images."""
    counts = np.unique(codes, return_counts=True)[1]
    if len(counts) < 2:
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _as_classes(column: Classes | Numbers) -> Classes:
    if isinstance(column, Classes):
        return column
    known = ~np.isnan(column.values)
    edges = np.quantile(column.values[known], np.arange(1, TENTHS) / TENTHS)
    codes = np.where(known, np.searchsorted(edges, column.values, side="right"), -1)
    return Classes(tuple(f"tenth {number}" for number in range(1, TENTHS + 1)), codes)

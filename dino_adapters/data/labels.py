"""Class names and groups of images: from a table, from folder names, or none."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dino_adapters.contracts import DataError
from dino_adapters.runtime.console import Notices

PATH_COLUMNS = ("path", "image")
FOLDER = "folder"
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known about images beside their pixels.

    Attributes:
        labels: Class name of each labelled key.
        groups: Group (patient, place, batch of uploads) of each key that has one.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)


def read_labels(
    where: str | Path | None, root: Path, keys: Sequence[str], *, notices: Notices | None = None
) -> Labels:
    """Labels and groups of images.

    Args:
        where: `folder` (the name of the folder that holds the image), a CSV with the columns
            `path`, `label` and optionally `group`, or None. Paths are relative to `root` or to
            the table, or absolute.
        root: Folder that keys are relative to.
        keys: Keys of the images.
        notices: Counts rows without an image and images without a row.

    Raises:
        DataError: the table is absent, lacks a column, contradicts itself or names no image; or
            the images lie in no class folders.
    """
    if where is None:
        return Labels()
    if str(where) == FOLDER:
        return Labels(_folder_names(root, keys))
    table = Path(where).expanduser()
    notices = Notices() if notices is None else notices
    rows = read_table(table, needed=("label",), notices=notices)
    known, bases = frozenset(keys), bases_of(table, root)
    labels: dict[str, str] = {}
    groups: dict[str, str] = {}
    lost = []
    for row in rows:
        key = key_of(row["path"], known, bases)
        if key is None:
            lost.append(row["path"])
            continue
        label = row["label"].strip()
        if label:
            _put(labels, key, label, "label", table)
        if row.get("group", "").strip():
            _put(groups, key, row["group"].strip(), "group", table)
    if not labels:
        raise DataError(_no_label(table, root, rows, lost, keys))
    _note(notices, lost, len(rows), "rows of the label table have no image")
    _note(notices, [key for key in keys if key not in labels], len(keys), "images have no label")
    return Labels(labels, groups)


def read_table(
    path: Path, *, needed: Sequence[str] = (), notices: Notices | None = None
) -> list[dict[str, str]]:
    """Rows of a CSV with a header; the column `image` counts as `path`.

    Cells are separated by commas; semicolons and tabs, as spreadsheets write them, are noticed by
    the header and read, too.

    Args:
        path: UTF-8 file; a byte order mark is taken off.
        needed: Columns that must be there beside `path`.
        notices: Says where cells are not separated by commas.

    Raises:
        DataError: the file is absent, not UTF-8 text, or lacks a column.
    """
    if not path.is_file():
        columns = " and ".join(("path", *needed))
        raise DataError(
            f"There is no table {path}. Give a CSV file with the "
            f"column{'s' if needed else ''} {columns}."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            mark = _separator(opened.readline())
            opened.seek(0)
            reader = csv.DictReader(opened, delimiter=mark)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a UTF-8 CSV table ({error}). Save it as one.") from error
    _note_separator(notices, mark, path)
    column = next((name for name in PATH_COLUMNS if name in header), None)
    missing = [name for name in needed if name not in header]
    if column is None or missing:
        absent = [*(["path"] if column is None else []), *missing]
        raise DataError(
            f"{path} has the columns {', '.join(header) or 'none'}, and not {', '.join(absent)}. "
            "Rename or add them; the first line is the header."
        )
    complete = []
    for number, row in enumerate(rows, start=2):
        if any(row.get(name) is None for name in (column, *needed)):
            raise DataError(f"Line {number} of {path} has too few columns. Fill or remove it.")
        # DictReader keeps surplus cells under None, and absent ones as None.
        complete.append({name: value or "" for name, value in row.items() if name is not None})
        complete[-1]["path"] = complete[-1][column].strip().replace("\\", "/")
    return complete


def _separator(header: str) -> str:
    """The first of `,`, `;` and tab that makes the header hold a column of paths, else a comma."""
    for mark in _SEPARATORS:
        cells = next(csv.reader([header], delimiter=mark), [])
        if any(cell.strip() in PATH_COLUMNS for cell in cells):
            return mark
    return ","


def _note_separator(notices: Notices | None, mark: str, path: Path) -> None:
    what = f"tables whose cells are separated by {_SEPARATORS[mark]}, read as such"
    # One table may be read twice, for its images and for their labels.
    if notices is not None and mark != "," and str(path) not in notices.examples.get(what, ()):
        notices.add(what, str(path))


def _folder_names(root: Path, keys: Sequence[str]) -> dict[str, str]:
    labels = {key: PurePosixPath(key).parent.name for key in keys}
    bare = [key for key, name in labels.items() if not name]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(keys)} images lie directly in {root} (e.g. {bare[0]}), so no "
            "folder names their class. Sort them into class folders, or give a CSV of labels."
        )
    return labels


def bases_of(table: Path, root: Path) -> list[tuple[str, str]]:
    """Pairs of the table's folder and the root, as spelt and with links resolved."""
    folders = dict.fromkeys((os.path.abspath(table.parent), os.path.realpath(table.parent)))
    roots = dict.fromkeys((os.path.abspath(root), os.path.realpath(root)))
    return [(folder, top) for folder in folders for top in roots]


def key_of(path: str, known: Collection[str], bases: Sequence[tuple[str, str]]) -> str | None:
    """The key that a row means: its path from the root, from the table, or from the disk's top."""
    key = PurePosixPath(os.path.normpath(path).replace(os.sep, "/")).as_posix()
    if key in known:
        return key
    for folder, top in bases:
        # An absolute path replaces the folder when joined.
        full = os.path.normpath(os.path.join(folder, path))
        for place in (full, os.path.realpath(full)):
            if place.startswith(os.path.join(top, "")):
                key = os.path.relpath(place, top).replace(os.sep, "/")
                if key in known:
                    return key
    return None


def _no_label(
    table: Path,
    root: Path,
    rows: Sequence[Mapping[str, str]],
    lost: Sequence[str],
    keys: Sequence[str],
) -> str:
    if not rows:
        return f"{table} has a header and no rows. Add a row with path and label for each image."
    if len(lost) < len(rows):
        return f"No row of {table} that names an image has a label. Fill the column label."
    held = f"'{keys[0]}'" if keys else "no images"
    return (
        f"No row of {table} names an image below {root}: the table says '{lost[0]}', and the "
        f"folder holds {held}. Write paths relative to that folder or to the table."
    )


def _note(notices: Notices, names: Sequence[str], total: int, what: str) -> None:
    for name in names:
        notices.add(f"{len(names)} of {total} {what}", name)


def _put(known: dict[str, str], key: str, value: str, what: str, table: Path) -> None:
    if known.setdefault(key, value) != value:
        raise DataError(
            f"{table} gives {key} the {what}s '{known[key]}' and '{value}'. Keep one row an image."
        )

"""Class names and groups of images: from a table, from folder names, or none."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dino_adapters.contracts import DataError
from dino_adapters.runtime.console import Notices

PATH_COLUMNS = ("path", "image")
FOLDER = "folder"


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
            the table.
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
    table = Path(where)
    rows = read_table(table, needed=("label",))
    notices = Notices() if notices is None else notices
    known, below = set(keys), _below(table, root)
    labels: dict[str, str] = {}
    groups: dict[str, str] = {}
    for row in rows:
        key = PurePosixPath(row["path"]).as_posix()
        if key not in known:
            key = os.path.normpath(PurePosixPath(below) / key).replace(os.sep, "/")
        if key not in known:
            notices.add("rows of the label table without an image", row["path"])
            continue
        label = row["label"].strip()
        if label:
            _put(labels, key, label, "label", table)
        if row.get("group", "").strip():
            _put(groups, key, row["group"].strip(), "group", table)
    if not labels:
        raise DataError(
            f"No row of {table} names an image below {root} (first path: "
            f"{rows[0]['path'] if rows else 'none'}). Paths must be relative to that folder or to "
            "the table."
        )
    bare = [key for key in keys if key not in labels]
    if bare:
        notices.add("images without a label", bare[0], len(bare))
    return Labels(labels, groups)


def read_table(path: Path, *, needed: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a CSV with a header; the column `image` counts as `path`.

    Args:
        path: UTF-8 file; a byte order mark is taken off.
        needed: Columns that must be there beside `path`.

    Raises:
        DataError: the file is absent, not UTF-8 text, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"There is no table {path}. Give a CSV file with the column path.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a UTF-8 CSV table ({error}). Save it as one.") from error
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


def _folder_names(root: Path, keys: Sequence[str]) -> dict[str, str]:
    labels = {key: PurePosixPath(key).parent.name for key in keys}
    bare = [key for key, name in labels.items() if not name]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(keys)} images lie directly in {root} (e.g. {bare[0]}), so no "
            "folder names their class. Sort them into class folders, or give a CSV of labels."
        )
    return labels


def _below(table: Path, root: Path) -> str:
    """The table's folder as seen from the root: `.`, `../lists`, ..."""
    try:
        return os.path.relpath(table.resolve().parent, root.resolve()).replace(os.sep, "/")
    except ValueError:  # another drive: then only paths relative to the root can match
        return "."


def _put(known: dict[str, str], key: str, value: str, what: str, table: Path) -> None:
    if known.setdefault(key, value) != value:
        raise DataError(
            f"{table} gives {key} the {what}s '{known[key]}' and '{value}'. Keep one row an image."
        )

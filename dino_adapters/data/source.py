"""Folders, patterns and tables of images: sorted keys, and the sample behind each."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from dino_adapters.contracts import Band, DataError, Reader, Sample, UnknownNameError
from dino_adapters.data import photo, raster  # noqa: F401  (they register their readers)
from dino_adapters.data.labels import read_labels, read_table
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import file_digest
from dino_adapters.runtime.lookup import READERS

# What recipes hold in the place of a folder that only their user knows.
_UNNAMED = "give data.source"


class SourceSettings(Protocol):
    """The part of a recipe's data section that says where images are and how they are read."""

    @property
    def source(self) -> str:
        """Folder, pattern or CSV."""
        ...

    @property
    def labels(self) -> str | None:
        """CSV, `folder` or None."""
        ...

    @property
    def bands(self) -> tuple[str, ...] | None:
        """Names of the files' channels."""
        ...

    @property
    def value_range(self) -> tuple[float, float] | None:
        """File values that mean 0 and 1."""
        ...


class ImageSource:
    """A set of image files with stable keys. Reading is safe from several threads.

    Attributes:
        root: Folder that keys are relative to.
        keys: POSIX paths below `root`, sorted.
        labels: Class name of each labelled key.
        groups: Group of each key that has one.
        notices: What was skipped, converted or assumed so far.
    """

    def __init__(
        self,
        root: Path,
        keys: Sequence[str],
        readers: Mapping[str, Reader],
        *,
        labels: Mapping[str, str] | None = None,
        groups: Mapping[str, str] | None = None,
        notices: Notices | None = None,
    ) -> None:
        self.root = root
        self.keys = tuple(sorted(keys))
        self.labels: Mapping[str, str] = dict(labels or {})
        self.groups: Mapping[str, str] = dict(groups or {})
        self.notices = Notices() if notices is None else notices
        self._readers = readers
        self._known = frozenset(self.keys)

    def path(self, key: str) -> Path:
        """The file behind a key.

        Raises:
            UnknownNameError: there is no such key.
        """
        if key not in self._known:
            raise UnknownNameError(
                f"There is no image '{key}' below {self.root}. Keys are paths relative to it, such "
                f"as '{self.keys[0]}'."
            )
        return self.root / key

    def read(self, key: str) -> Sample:
        """The image, its label and its group.

        Raises:
            UnreadableFileError: the file is damaged; collectors skip it, count it and name it.
            UnitsError: the names of bands do not fit it.
        """
        path = self.path(key)
        sample = self._readers[path.suffix.lower()].read(path, key)
        return replace(sample, label=self.labels.get(key), group=self.groups.get(key, sample.group))

    def digest(self, key: str) -> str:
        """Hex digest of the file's content."""
        return file_digest(self.path(key))

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)


def open_source(
    where: str | Path,
    *,
    labels: str | Path | None = None,
    bands: Sequence[str | Band] | None = None,
    value_range: tuple[float, float] | None = None,
    notices: Notices | None = None,
) -> ImageSource:
    """Finds images without reading them.

    Args:
        where: A folder (searched below), a pattern such as `photos/**/*.jpg`, or a CSV with a
            column `path` relative to the CSV (its `label` and `group` columns are used if
            `labels` is None).
        labels: A CSV with `path` and `label` (and `group`), `folder` for the name of the folder
            that holds an image, or None.
        bands: Names of the files' channels, in their order; whole bands keep their own range.
        value_range: File values that mean 0 and 1; needed for everything but 8 bits.
        notices: Counts what is ignored, skipped or converted.

    Raises:
        DataError: nothing is there, nothing there is an image, or a table contradicts itself.
    """
    if str(where).startswith(_UNNAMED):
        raise DataError("No images were named: add data.source=FOLDER.")
    notices = Notices() if notices is None else notices
    readers = _readers(bands, value_range, notices)
    text, path = str(where), Path(where).expanduser()
    if path.is_dir():
        root, keys = path, _search(path, readers, notices)
    elif path.suffix.lower() == ".csv":
        root = path.parent
        keys = _listed(path, readers, notices)
        if labels is None and "label" in (read_table(path) or [{}])[0]:
            labels = path
    elif glob.has_magic(text) and not path.exists():
        root, keys = _matching(path, readers, notices)
    elif path.exists():
        raise DataError(
            f"{where} is a file. Give a folder, a pattern such as '{path.parent}/*.jpg', or a CSV "
            "with a column path."
        )
    else:
        raise DataError(f"There is no folder or table {where}. Check its spelling.")
    found = read_labels(labels, root, sorted(keys), notices=notices)
    return ImageSource(
        root, keys, readers, labels=found.labels, groups=found.groups, notices=notices
    )


def load_source(recipe: SourceSettings, notices: Notices | None = None) -> ImageSource:
    """The images that a recipe's data section names.

    Raises:
        DataError: as `open_source`.
    """
    return open_source(
        recipe.source,
        labels=recipe.labels,
        bands=recipe.bands,
        value_range=recipe.value_range,
        notices=notices,
    )


def _readers(
    bands: Sequence[str | Band] | None,
    value_range: tuple[float, float] | None,
    notices: Notices,
) -> dict[str, Reader]:
    """One reader for each suffix, from the registry, so that readers of users are found, too."""
    made: dict[str, Reader] = {}
    for kind in READERS.module_dict.values():
        reader = kind(bands=bands, value_range=value_range, notices=notices)
        made.update(dict.fromkeys(reader.suffixes, reader))
    return made


def _search(root: Path, readers: Mapping[str, Reader], notices: Notices) -> list[str]:
    keys, others, seen = [], 0, set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            key = (Path(folder) / name).relative_to(root).as_posix()
            if not _wanted(key, readers, notices):
                others += 1
                continue
            keys.append(key)
    return _some(keys, others, f"The folder {root}", readers)


def _matching(
    pattern: Path, readers: Mapping[str, Reader], notices: Notices
) -> tuple[Path, list[str]]:
    """Keys are relative to the folder before the first wildcard, so they survive a move."""
    fixed = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed) if fixed else Path()
    keys, others = [], 0
    for name in sorted(glob.iglob(str(pattern), recursive=True)):
        path = Path(name)
        key = path.relative_to(root).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in PurePosixPath(key).parts):
            continue
        if _wanted(key, readers, notices):
            keys.append(key)
        else:
            others += 1
    return root, _some(keys, others, f"The pattern {pattern}", readers)


def _listed(table: Path, readers: Mapping[str, Reader], notices: Notices) -> list[str]:
    keys: dict[str, None] = {}
    others, absent = 0, []
    root = table.parent.resolve()
    for row in read_table(table, notices=notices):
        path = Path(os.path.normpath(root / row["path"]))
        if not path.is_relative_to(root):
            raise DataError(
                f"{table} lists {row['path']}, which is not below its own folder. Put the table "
                "beside or above the images, so that their names are the same on every machine."
            )
        key = path.relative_to(root).as_posix()
        if not _wanted(key, readers, notices):
            others += 1
        elif not path.is_file():
            absent.append(row["path"])
        elif key in keys:
            notices.add("images listed more than once in the table, taken once", key)
        else:
            keys[key] = None
    if absent:
        raise DataError(
            f"{table} lists {len(absent)} files that are not there, e.g. "
            f"{', '.join(absent[:3])}. Paths are relative to the table's own folder."
        )
    return _some(list(keys), others, f"The table {table}", readers)


def _wanted(key: str, readers: Mapping[str, Reader], notices: Notices) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        # Such a name could not be written to any manifest, list or report.
        notices.add("files ignored because their names are not UTF-8", ascii(key))
        return False
    suffix = PurePosixPath(key).suffix.lower()
    if suffix not in readers:
        notices.add("files ignored because they are no images by their suffix", key)
        return False
    return True


def _some(keys: list[str], others: int, place: str, readers: Mapping[str, Reader]) -> list[str]:
    if keys:
        return keys
    if not others:
        raise DataError(f"{place} holds no files. Give one that holds images.")
    raise DataError(
        f"{place} holds {others} file{'s' if others > 1 else ''}, but no image. Images are known "
        f"by their suffix: {', '.join(sorted(readers))}. Convert others, such as "
        "DICOM and NIfTI, to 16-bit PNG or TIFF first."
    )

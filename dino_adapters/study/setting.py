"""What `start` works on: the images, their labels if there are any, and the split."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dino_adapters.contracts import Band, DataError, Sample, UnreadableFileError
from dino_adapters.data import ImageSource, open_source
from dino_adapters.data.demo_tiles import make_tiles
from dino_adapters.data.splits import Split, make_split, read_split, write_split
from dino_adapters.pretrain.intake import common_bands
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.runtime.console import Notices

LOGGER = logging.getLogger(__name__)
SPLIT_FILES = ("split.json", "splits.json")
SPLIT_FILE = "split.json"
LOOKS = 32
LEAST_CLASSES = 2
LEAST_PER_CLASS = 4  # fewer cannot be dealt to three parts


@dataclass(frozen=True)
class Setting:
    """Images, split, and how the runs see the training part.

    Attributes:
        source: all images, with labels and groups where known.
        split: None without labels: then nothing can be measured and all images train.
        training: the images as a data section of a recipe.
        split_file: the split on disk, by which runs keep to the training part; None without one.
        side: usual shorter side in pixels.
        bands: what the images hold; grey among colour counts as colour.
        words: one sentence on what it is.
    """

    source: ImageSource
    split: Split | None
    training: DataRecipe
    split_file: Path | None
    side: int
    bands: tuple[Band, ...]
    words: str


def gather(
    data: Path | None,
    labels: str | Path | None,
    folder: Path,
    *,
    bands: Sequence[str] | None,
    value_range: tuple[float, float] | None,
    seed: int,
    notices: Notices,
) -> Setting:
    """Finds or makes the images, and a split in which training and test share no place.

    Args:
        data: the user's folder, pattern or table; None builds the example tiles.
        labels: as in `open_source`. None takes the folders' names where each class has one.
        folder: where the split is written.
        bands: names of the files' channels; needed for anything but grey or RGB.
        value_range: file values that mean 0 and 1; needed for 16-bit and float images.
        seed: of the split, where none comes with the data.
        notices: where skips are counted.

    Raises:
        DataError: no images, or labels that do not fit them.
    """
    if data is None:
        where: Path = make_tiles(folder / "tiles")
        source = open_source(where, labels=where / "labels.csv", notices=notices)
        words = "Tiles of photographs that come with scikit-image and scikit-learn"
    else:
        where = data
        given = {"bands": bands, "value_range": value_range, "notices": notices}
        source = open_source(where, labels=labels, **given)
        if not source.labels and _folders_are_classes(source):
            source = open_source(where, labels="folder", **given)
        words = f"Images of {where.name or where}"
    split = _split(source, folder, seed=seed, notices=notices)
    keys = source.keys if split is None else split.train
    training = DataRecipe(
        source=str(where), bands=None if bands is None else tuple(bands), value_range=value_range
    )
    looks = _look(source, keys)
    side = int(statistics.median(min(look.pixels.shape[-2:]) for look in looks))
    classes = len(set(source.labels.values()))
    words += f": {len(keys)} for training without labels"
    if split is not None:
        words += (
            f", {len(split.val)} to choose settings on, {len(split.test)} to test on, "
            f"{classes} classes; {split.rule}"
        )
    written = None if split is None else folder / SPLIT_FILE
    return Setting(source, split, training, written, side, common_bands(looks), f"{words}.")


def _look(source: ImageSource, keys: tuple[str, ...]) -> list[Sample]:
    """Up to 32 images, evenly spread.

    Raises:
        DataError: none of them can be read.
    """
    looks, reason = [], ""
    for key in keys[:: max(1, len(keys) // LOOKS)][:LOOKS]:
        try:
            looks.append(source.read(key))
        except UnreadableFileError as error:
            reason = str(error)  # counted and named where it is read for good
    if not looks:
        raise DataError(f"None of the images looked at can be read (last: {reason}).")
    return looks


def _folders_are_classes(source: ImageSource) -> bool:
    """Whether every image lies in one of several folders of some images each; says so."""
    parents = Counter(str(Path(key).parent) for key in source.keys)
    if "." in parents or len(parents) < LEAST_CLASSES or min(parents.values()) < LEAST_PER_CLASS:
        LOGGER.warning(
            "There are no labels, so nothing can be measured. Give --labels a CSV with the columns "
            "path and label; some images of each class are enough."
        )
        return False
    LOGGER.info("The names of the %d folders are taken for classes.", len(parents))
    return True


def _split(source: ImageSource, folder: Path, *, seed: int, notices: Notices) -> Split | None:
    if not source.labels:
        return None
    if (folder / SPLIT_FILE).exists():  # an interrupted run goes on with its own
        return read_split(folder / SPLIT_FILE, keys=source.keys)
    for name in SPLIT_FILES:
        if (source.root / name).exists():
            LOGGER.info("The split is read from %s.", name)
            split = read_split(source.root / name, keys=source.keys)
            break
    else:
        # Unlabelled images can still train.
        labelled = [key for key in source.keys if key in source.labels]
        split = make_split(labelled, source.labels, source.groups, seed=seed, notices=notices)
        rest = tuple(key for key in source.keys if key not in source.labels)
        if rest:
            split = replace(split, train=split.train + rest, digest="")
    write_split(folder / SPLIT_FILE, split)
    return split

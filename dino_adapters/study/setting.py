"""What `start` works on: the images, their labels if there are any, and the split."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from dino_adapters.contracts import UnreadableFileError
from dino_adapters.data import ImageSource, open_source
from dino_adapters.data.demo_tiles import make_tiles
from dino_adapters.data.splits import Split, make_split, read_split, write_split
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
        words: one sentence on what it is.
    """

    source: ImageSource
    split: Split | None
    training: DataRecipe
    split_file: Path | None
    side: int
    words: str


def gather(
    data: Path | None, labels: str | Path | None, folder: Path, *, seed: int, notices: Notices
) -> Setting:
    """Finds or makes the images, and a split in which training and test share no place.

    Args:
        data: the user's folder, pattern or table; None builds the example tiles.
        labels: as in `open_source`. None takes the folders' names where each class has one.
        folder: where the split is written.
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
        source = open_source(where, labels=labels, notices=notices)
        if not source.labels:
            source = _with_folder_names(source, where, notices)
        words = f"Images of {where.name or where}"
    split = _split(source, folder, seed=seed, notices=notices)
    keys = source.keys if split is None else split.train
    training = DataRecipe(source=str(where))
    classes = len(set(source.labels.values()))
    words += f": {len(keys)} for training without labels"
    if split is not None:
        words += (
            f", {len(split.val)} to choose settings on, {len(split.test)} to test on, "
            f"{classes} classes; {split.rule}"
        )
    written = None if split is None else folder / SPLIT_FILE
    return Setting(source, split, training, written, usual_side(source, keys), f"{words}.")


def usual_side(source: ImageSource, keys: tuple[str, ...]) -> int:
    """Median of the shorter sides of up to 32 images, in pixels."""
    sides = []
    for key in keys[:: max(1, len(keys) // LOOKS)][:LOOKS]:
        try:
            sides.append(min(source.read(key).pixels.shape[-2:]))
        except UnreadableFileError:
            continue  # counted and named where it is read for good
    return int(statistics.median(sides)) if sides else 224


def _with_folder_names(source: ImageSource, where: Path, notices: Notices) -> ImageSource:
    parents = Counter(str(Path(key).parent) for key in source.keys)
    enough = [name for name, count in parents.items() if count >= LEAST_PER_CLASS]
    if "." in parents or len(enough) < LEAST_CLASSES or len(enough) < len(parents):
        LOGGER.warning(
            "There are no labels, so nothing can be measured. Give --labels a CSV with the columns "
            "path and label; some images of each class are enough."
        )
        return source
    LOGGER.info("The names of the %d folders are taken for classes.", len(parents))
    return open_source(where, labels="folder", notices=notices)


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

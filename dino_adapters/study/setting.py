"""What `start` works on: the images, their labels if there are any, and the split."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dino_adapters.contracts import Band, DataError, UnitsError
from dino_adapters.data import ImageSource, open_source
from dino_adapters.data.splits import Split, make_split, read_split
from dino_adapters.pretrain.intake import common_bands, look_at
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.runtime.console import Notices

LOGGER = logging.getLogger(__name__)
SPLIT_FILES = ("split.json", "splits.json")
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
    where: Path,
    labels: str | Path | None,
    written: Path,
    *,
    bands: Sequence[str] | None,
    value_range: tuple[float, float] | None,
    seed: int,
    notices: Notices,
) -> Setting:
    """Finds the images, their labels and a split in which training and test share no place.

    Writes nothing, so that everything can be refused before a folder is touched.

    Args:
        where: folder, pattern or table of images.
        labels: as in `open_source`. None takes the folders' names where each class has one.
        written: file of the split; the split of an interrupted run is read from it.
        bands: names of the files' channels; needed for anything but grey or RGB.
        value_range: file values that mean 0 and 1; needed for 16-bit and float images.
        seed: of the split, where none comes with the data.
        notices: where skips are counted.

    Raises:
        DataError: no images, labels that do not fit them, or a split that cannot be used.
        UnitsError: the value range of 16-bit or float images is not given.
    """
    given = {"bands": bands, "value_range": value_range, "notices": notices}
    source = open_source(where, labels=labels, **given)
    if not source.labels and _folders_are_classes(source):
        source = open_source(where, labels="folder", **given)
    classes = sorted(set(source.labels.values()))
    if len(classes) == 1:
        raise DataError(
            f"All {len(source.labels)} labelled images are of one class, '{classes[0]}'. Give "
            "images of two classes or more, or none with a label."
        )
    split = _split(source, written, seed=seed, notices=notices)
    keys = source.keys if split is None else split.train
    try:
        looks = look_at(source, keys, LOOKS)
    except UnitsError as error:
        raise UnitsError(f"{error} (Here: --value-range LOW,HIGH.)") from None
    training = DataRecipe(
        source=str(where), bands=None if bands is None else tuple(bands), value_range=value_range
    )
    words = f"{where.name or where}: {len(keys)} images for training without labels"
    if split is not None:
        words += (
            f", {len(split.val)} to choose settings on, {len(split.test)} to test on, "
            f"{len(classes)} classes; {split.rule}"
        )
    side = int(statistics.median(look.side for look in looks))
    common = common_bands([look.bands for look in looks])
    file = None if split is None else written
    return Setting(source, split, training, file, side, common, f"{words}.")


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


def _split(source: ImageSource, written: Path, *, seed: int, notices: Notices) -> Split | None:
    if not source.labels:
        return None
    if written.exists():  # an interrupted run goes on with its own
        return read_split(written, keys=source.keys)
    theirs = next((source.root / n for n in SPLIT_FILES if (source.root / n).exists()), None)
    if theirs is not None:
        LOGGER.info("The split is read from %s.", theirs.name)
        split = read_split(theirs, keys=source.keys)
    else:
        labelled = [key for key in source.keys if key in source.labels]
        split = make_split(labelled, source.labels, source.groups, seed=seed, notices=notices)
        split = _with_unlabelled(split, source, notices)
    for part in ("val", "test"):
        keys = getattr(split, part)
        nameless = [key for key in keys if key not in source.labels]
        if not keys or nameless:
            raise DataError(
                f"The part '{part}' of the split has {len(keys)} images, {len(nameless)} of them "
                "without a label. Reading sizes are chosen on 'val' and results measured on "
                "'test': give both some labelled images of each class."
            )
    return split


def _with_unlabelled(split: Split, source: ImageSource, notices: Notices) -> Split:
    """Unlabelled images train, too, unless they are of a patient or place that is held out."""
    held_out = {source.groups.get(key) for key in (*split.val, *split.test)} - {None}
    rest = [key for key in source.keys if key not in source.labels]
    kept = tuple(key for key in rest if source.groups.get(key) not in held_out)
    if len(kept) < len(rest):
        notices.add(
            "unlabelled images left out, as their group is held out for choosing or testing",
            count=len(rest) - len(kept),
        )
    train = split.train + kept
    return replace(
        split, train=train, digest="", groups={**split.groups, **_groups_of(source, kept)}
    )


def _groups_of(source: ImageSource, keys: Sequence[str]) -> dict[str, str]:
    return {key: source.groups[key] for key in keys if key in source.groups}

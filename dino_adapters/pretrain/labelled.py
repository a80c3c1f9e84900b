"""Labelled images beside a run: some to learn from and to choose by, others to judge on."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_adapters.contracts import BackboneInfo, UnreadableFileError
from dino_adapters.data import ImageSource, open_source
from dino_adapters.data.damage import problem_of
from dino_adapters.data.labels import read_labels
from dino_adapters.data.resize import to_square
from dino_adapters.data.splits import PARTS, Split, check_leaks, make_split, read_split
from dino_adapters.data.units import check_size, to_model
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import numpy_generator
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import json_digest

LEAST_CLASSES, LEAST_QUERIES = 2, 10
TOO_FEW = "too few labelled images to compare networks on"
SEED = 0
"""Not the recipe's: its phases, and runs with other seeds, are judged on the same images."""
MEMORY_BYTES = 10**9
"""Decoded images are kept up to this size, as they are read again in every look."""


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Two parts without a common image or group.

    Attributes:
        source: What reads the images.
        gallery: Keys that both probes learn from. Whatever is chosen (reading size, best look,
            when to stop) is chosen on them.
        queries: Keys that a verdict is read from; nothing is chosen on them.
        labels: Class of each of these images.
        groups: Group of each of them; an image that has none is its own.
        seen: Whether training reads the queries, too, without their labels.
        squares: The decoded images.
        workers: Threads that read.
        max_unreadable: Share of them that may be unreadable.
        notices: Where skips are counted.
    """

    source: ImageSource
    gallery: tuple[str, ...]
    queries: tuple[str, ...]
    labels: Mapping[str, str]
    groups: Mapping[str, str]
    seen: bool
    squares: Squares
    workers: int
    max_unreadable: float
    notices: Notices

    def __post_init__(self) -> None:
        """Refuses a group in both parts."""
        check_leaks({"gallery": self.gallery, "queries": self.queries}, self.groups)

    @property
    def digest(self) -> str:
        """Digest of both parts, classes and groups: what two looks must share to be compared."""
        parts = (self.gallery, self.queries)
        return json_digest(
            [[[key, self.labels[key], self.groups[key]] for key in part] for part in parts]
        )

    def labels_of(self, keys: Sequence[str]) -> np.ndarray:
        """Their classes `(n,)`."""
        return np.array([self.labels[key] for key in keys], dtype=np.str_)

    def groups_of(self, keys: Sequence[str]) -> np.ndarray:
        """Their groups `(n,)`."""
        return np.array([self.groups[key] for key in keys], dtype=np.str_)


class Squares:
    """Images as squares with values in 0..1, decoded once; safe from several threads.

    Args:
        source: What reads the images.
        notices: Where unreadable and converted files are counted.
        memory: Bytes of squares that are kept; what does not fit is decoded whenever asked for.
    """

    def __init__(self, source: ImageSource, notices: Notices, memory: int = MEMORY_BYTES) -> None:
        self.source, self.notices = source, notices
        self.unreadable: set[str] = set()
        self._room = memory
        self._kept: dict[tuple[object, ...], Tensor] = {}
        self._lock = threading.Lock()

    def get(self, key: str, info: BackboneInfo, sizes: Sequence[int]) -> dict[int, Tensor] | None:
        """Size -> `(C, size, size)`: uint8 of 8-bit files, else float32. None: unreadable."""
        if key in self.unreadable:
            return None
        # Pixels without data hold the mean, so squares belong to a normalisation.
        reading = (tuple(band.name for band in info.bands), info.mean, info.std)
        found = {size: self._kept.get((key, size, *reading)) for size in sizes}
        absent = [size for size, square in found.items() if square is None]
        try:
            made = self._decode(key, info, absent) if absent else {}
        except (UnreadableFileError, OSError) as error:
            with self._lock:
                self.unreadable.add(key)
            self.notices.add("unreadable labelled images left out", problem_of(key, error))
            return None
        with self._lock:
            for size, square in made.items():
                bulk = square.numel() * square.element_size()
                if bulk <= self._room and (key, size, *reading) not in self._kept:
                    self._room -= bulk
                    self._kept[key, size, *reading] = square
        return {size: square for size, square in (found | made).items() if square is not None}

    def _decode(self, key: str, info: BackboneInfo, sizes: Sequence[int]) -> dict[int, Tensor]:
        sample = self.source.read(key)
        check_size(sample, info.patch_size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
        # There and back, as in `intake`: 0..1 is what fits into bytes.
        image = (to_model(sample, info, notices=self.notices) * std + mean).clamp_(0.0, 1.0)
        squares = {size: to_square(image, size) for size in sizes}
        if sample.pixels.dtype != np.uint8:
            return squares
        return {size: (x * 255).round().to(torch.uint8) for size, x in squares.items()}


def labelled_set(
    recipe: PretrainRecipe, source: ImageSource, notices: Notices
) -> LabelledSet | None:
    """The labelled images that a run is watched and judged on; None where there are too few.

    With a split the gallery comes from its part `train` and the queries from `val`; `test` is
    never read. Without one, or where `val` holds no label, whole groups are dealt to both halves,
    stratified by class. At most `monitor.labelled` images are taken, as many of each class and of
    as many groups as can be. The division depends on the images alone, not on the recipe's seed.

    Args:
        recipe: The whole recipe, of the run or of one of its phases.
        source: The run's images.
        notices: Says what was left out, and why there is no set where images have labels.

    Raises:
        DataError: labels, split or `monitor.source` are absent or do not fit the images.
    """
    ours, labels, groups = _find(recipe, source, notices)
    if not labels:
        return None
    split = None if recipe.split is None else read_split(Path(recipe.split), keys=source.keys)
    same = _same_files(ours, source)
    own = _own_groups(labels, groups, same, split)
    gallery, queries = _divide(labels, own, same, split, recipe.monitor.labelled, notices)
    reason = _too_few(gallery, queries, labels, own)
    if reason:
        notices.add(f"{TOO_FEW}: {reason}")
        return None
    trained = frozenset(source.keys if split is None else split.train)
    taken = (*gallery, *queries)
    return LabelledSet(
        ours,
        tuple(gallery),
        tuple(queries),
        {key: labels[key] for key in taken},
        {key: own[key] for key in taken},
        seen=any(same.get(key) in trained for key in queries),
        squares=Squares(ours, notices),
        workers=recipe.data.workers,
        max_unreadable=recipe.data.max_unreadable,
        notices=notices,
    )


def too_few(notices: Notices) -> str:
    """Why `labelled_set` made none of images that have labels; empty if it did not say so."""
    return next((line for line in notices.counts if line.startswith(TOO_FEW)), "")


def _find(
    recipe: PretrainRecipe, source: ImageSource, notices: Notices
) -> tuple[ImageSource, Mapping[str, str], Mapping[str, str]]:
    """What holds the labelled images, their classes, and their groups."""
    told, data = recipe.monitor, recipe.data
    if told.source is not None:
        source = open_source(
            told.source,
            labels=told.labels or data.labels,
            bands=data.bands,
            value_range=data.value_range,
            notices=notices,
        )
    elif told.labels is not None:
        found = read_labels(told.labels, source.root, source.keys, notices=notices)
        return source, found.labels, {**source.groups, **found.groups}
    return source, source.labels, source.groups


def _same_files(ours: ImageSource, theirs: ImageSource) -> dict[str, str]:
    """Key of `ours` -> key of the same file in `theirs`, where it is there, too."""
    if ours is theirs:
        return {key: key for key in ours.keys}
    here, there = ours.root.resolve(), theirs.root.resolve()
    known = {str(there / key): key for key in theirs.keys}
    files = {key: str(here / key) for key in ours.keys}
    return {key: known[file] for key, file in files.items() if file in known}


def _own_groups(
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    same: Mapping[str, str],
    split: Split | None,
) -> dict[str, str]:
    """Group of each labelled image, the split's own before others; one without is its own."""
    named = {} if split is None else split.groups
    own = {}
    for key in labels:
        group = named.get(same.get(key, ""), groups.get(key))
        # The marks keep an image without a group apart from a group of the same name.
        own[key] = f"image/{key}" if group is None else f"group/{group}"
    return own


def _divide(
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    same: Mapping[str, str],
    split: Split | None,
    most: int,
    notices: Notices,
) -> tuple[list[str], list[str]]:
    """Gallery and queries: at most so many images, no group in both, no class in queries alone."""
    parts: dict[str | None, list[str]] = defaultdict(list)
    named = {} if split is None else {k: name for name in PARTS for k in getattr(split, name)}
    for key in sorted(labels):
        parts[named.get(same.get(key, ""))].append(key)
    if parts["train"] and parts["val"]:
        gallery, queries = _disjoint(parts["train"], parts["val"], labels, groups, notices)
        asked = min(len(queries), max(most // 2, most - len(gallery)))
        gallery = _spread(gallery, labels, groups, most - asked, notices)
        queries = _spread(queries, labels, groups, asked, notices)
        return _disjoint(gallery, queries, labels, groups, notices)  # the cut may cost a class
    # Images from elsewhere, which the split does not know, may all be taken.
    rest = parts["train"] or parts["val"] or parts[None]
    rest = _spread(rest, labels, groups, most, notices)
    if len({groups[key] for key in rest}) < 2:
        return rest, []
    halves = make_split(rest, labels, groups, seed=SEED, val=0.5, test=0.0)
    return _disjoint(halves.train, halves.val, labels, groups, notices)


def _disjoint(
    gallery: Sequence[str],
    queries: Sequence[str],
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    notices: Notices,
) -> tuple[list[str], list[str]]:
    """Takes queries out that share a group with the gallery, or whose class it does not hold."""
    known, learned = {groups[key] for key in gallery}, {labels[key] for key in gallery}
    kept = []
    for key in queries:
        if groups[key] in known:
            notices.add("labelled images left out, as others of their group are learned from", key)
        elif labels[key] not in learned:
            notices.add("classes not asked for, as no image of them is learned from", labels[key])
        else:
            kept.append(key)
    return list(gallery), kept


def _spread(
    keys: Sequence[str],
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    most: int,
    notices: Notices,
) -> list[str]:
    """At most so many images: class by class in turn, and within a class group by group."""
    if len(keys) <= most:
        return list(keys)
    # No example: both parts may be cut, and the counts add up.
    notices.add("labelled images beyond monitor.labelled left out", count=len(keys) - most)
    drawn = numpy_generator(SEED, "labelled").permutation(len(keys))
    in_group: dict[tuple[str, str], int] = defaultdict(int)
    queues: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for place, key in enumerate(keys[int(index)] for index in drawn):
        cell = (labels[key], groups[key])
        queues[labels[key]].append((in_group[cell], place, key))
        in_group[cell] += 1
    turns = [
        (turn, label, key)
        for label, queue in queues.items()
        for turn, (_, _, key) in enumerate(sorted(queue))
    ]
    return sorted(key for _, _, key in sorted(turns)[:most])


def _too_few(
    gallery: Sequence[str],
    queries: Sequence[str],
    labels: Mapping[str, str],
    groups: Mapping[str, str],
) -> str:
    """Why these images are too few; empty where they are not."""
    named = set(labels.values())
    if len(named) < LEAST_CLASSES:
        return f"all {len(labels)} are of the class '{min(named)}', and two classes are needed"
    if len({(labels[key], groups[key]) for key in labels}) == len(named):
        return "no class has images of two groups, one to choose by and one to judge on"
    asked = len({labels[key] for key in queries})
    if len(queries) < LEAST_QUERIES or asked < LEAST_CLASSES:
        return (
            f"{len(queries)} of {asked} classes are left to judge on, beside {len(gallery)} to "
            f"learn from, and {LEAST_QUERIES} of {LEAST_CLASSES} classes are needed"
        )
    cells = {(labels[key], groups[key]) for key in gallery}
    names = [label for label, _ in cells]
    # Choices leave one group out at a time: a class of one group would have nothing to be found by.
    wide = sum(names.count(label) > 1 for label in set(names))
    if wide < LEAST_CLASSES:
        return (
            f"{wide} of {len(set(names))} classes have images of two groups to learn from, and "
            f"{LEAST_CLASSES} are needed to choose anything by"
        )
    return ""

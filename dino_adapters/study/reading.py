"""Reading networks fairly: every one at the size that suits it best on validation images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dino_adapters.backbones import FrozenBackbone
from dino_adapters.data import ImageSource
from dino_adapters.data.splits import Split
from dino_adapters.features import FeatureStore, embed
from dino_adapters.features.pool import vectors
from dino_adapters.runtime.chance import numpy_generator
from dino_adapters.runtime.console import Notices
from dino_adapters.study.fewshot import best_size

LOGGER = logging.getLogger(__name__)
MOST_PER_CLASS = 24
MOST_SIDE = 256  # reading larger images than this takes minutes on a CPU


@dataclass(frozen=True)
class Bench:
    """What all networks are compared on.

    Attributes:
        source: the images.
        split: train (support and centre), val (choices), test.
        folder: where feature stores live.
        seed: of draws and subsets.
        shots: support images of a class.
        quiet: no progress display.
        notices: where skips are counted.
    """

    source: ImageSource
    split: Split
    folder: Path
    seed: int
    shots: tuple[int, ...]
    quiet: bool
    notices: Notices

    @property
    def keys(self) -> tuple[str, ...]:
        """All images that are read."""
        return (*self.split.train, *self.split.val, *self.split.test)

    @property
    def groups(self) -> dict[str, str]:
        """Group of each image that has one."""
        return {**self.source.groups, **self.split.groups}

    def embed(self, backbone: FrozenBackbone, size: int, keys: Sequence[str]) -> FeatureStore:
        """Vectors of these images at this size, computed once."""
        return embed(
            backbone,
            self.source,
            self.folder,
            size=size,
            keys=keys,
            quiet=self.quiet,
            notices=self.notices,
        )


@dataclass(frozen=True)
class Reading:
    """One network, read at its best size.

    Attributes:
        name: row of the table.
        backbone: the network.
        size: chosen side in pixels.
        scores: size -> validation accuracy, of all sizes tried.
        store: vectors at the chosen size.
    """

    name: str
    backbone: FrozenBackbone
    size: int
    scores: Mapping[int, float]
    store: FeatureStore

    def vectors(self, keys: Sequence[str]) -> np.ndarray:
        """`(n, D)`: class token and mean patch, or the pooled map of a network without token."""
        return pooled(self.backbone, self.store, keys)


def pooled(backbone: FrozenBackbone, store: FeatureStore, keys: Sequence[str]) -> np.ndarray:
    """Vectors of one network; see `Reading.vectors`."""
    kind = "cls_mean" if backbone.info.family == "vit" else "cls"
    return vectors(store.read(keys), kind)


def read_at_best_size(
    name: str, backbone: FrozenBackbone, bench: Bench, sizes: Sequence[int]
) -> Reading:
    """Tries the sizes on validation images and reads everything at the best one.

    Args:
        name: row of the table.
        backbone: the network.
        bench: data and split; the test part plays no role in the choice.
        sizes: sides in pixels, multiples of the network's patch.
    """
    asked = (*bench.split.train, *bench.split.val)
    stores = {size: bench.embed(backbone, size, asked) for size in sizes}
    # Damaged files have been counted and named; the choice is made on the others.
    split = keep_readable(bench.split, set.intersection(*(set(s.keys) for s in stores.values())))
    choosing = (*split.train, *split.val)
    choice = best_size(
        {size: pooled(backbone, store, choosing) for size, store in stores.items()},
        choosing,
        bench.source.labels,
        bench.groups,
        split,
        shots=bench.shots,
        seed=bench.seed,
    )
    shown = ", ".join(f"{size} px {100 * score:.1f}" for size, score in choice.scores.items())
    LOGGER.info("%s is read at %d px (validation: %s)", name, choice.size, shown)
    store = bench.embed(backbone, choice.size, bench.keys)
    return Reading(name, backbone, choice.size, choice.scores, store)


def candidate_sizes(patch_size: int, trained_at: Sequence[int], side: int) -> tuple[int, ...]:
    """Sizes worth trying, the same for a network before and after training.

    Those that either was trained at and a step around them, the images' own, and twice that, as
    multiples of a patch. Sizes above 256 px that nobody was trained at are left out: reading them
    takes minutes on a CPU.

    Args:
        patch_size: of both networks.
        trained_at: their sizes, in pixels.
        side: of the images.
    """
    wanted = [float(size) for size in trained_at]
    extra = [trained_at[-1] * 1.4, float(side), 2.0 * side]
    wanted += [size for size in extra if size <= max(MOST_SIDE, *trained_at)]
    return tuple(sorted({max(1, round(size / patch_size)) * patch_size for size in wanted}))


def keep_readable(split: Split, readable: set[str]) -> Split:
    """The split without images that could not be read; those were counted and named."""
    train, val, test = (
        tuple(key for key in part if key in readable)
        for part in (split.train, split.val, split.test)
    )
    return replace(split, train=train, val=val, test=test, digest="")


def at_most(split: Split, labels: Mapping[str, str], seed: int) -> Split:
    """The split with at most 24 training images of a class: enough for every draw, quick to read.

    Returns:
        A split whose `rule` says so; the same object if nothing had to go.
    """
    by_class: dict[str, list[str]] = {}
    for key in split.train:
        by_class.setdefault(labels.get(key, ""), []).append(key)
    if all(len(keys) <= MOST_PER_CLASS for keys in by_class.values()):
        return split
    kept: list[str] = []
    for label, keys in sorted(by_class.items()):
        order = numpy_generator(seed, f"subset/{label}").permutation(len(keys))
        kept += [keys[index] for index in order[:MOST_PER_CLASS]]
    return Split(
        train=tuple(sorted(kept)),
        val=split.val,
        test=split.test,
        seed=split.seed,
        rule=f"{split.rule}; at most {MOST_PER_CLASS} training images of a class",
        groups=split.groups,
    )

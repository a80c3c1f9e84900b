"""What a labelled task is made of: images, split, backbone, and vectors on demand."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dino_adapters.heads  # noqa: F401  (its import registers the heads)
from dino_adapters.backbones import FrozenBackbone, load_backbone
from dino_adapters.contracts import DataError, RecipeError
from dino_adapters.data import ImageSource, load_source
from dino_adapters.data.splits import PARTS, Split, make_split, read_split
from dino_adapters.features import embed
from dino_adapters.features.pool import vectors
from dino_adapters.recipes.task import TaskRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.lookup import HEADS, find
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import pick_device

SPLIT = "split.json"


@dataclass(eq=False)
class Task:
    """A recipe's images, split and backbone; vectors are computed when first asked for."""

    recipe: TaskRecipe
    folder: RunFolder
    source: ImageSource
    split: Split
    backbone: FrozenBackbone
    notices: Notices
    quiet: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Reading sizes to choose from."""
        size = self.recipe.size
        if size is None:
            return (self.backbone.info.size,)
        return (size,) if isinstance(size, int) else tuple(size)

    @property
    def groups(self) -> dict[str, str]:
        """Group of each key that has one."""
        return {**self.source.groups, **self.split.groups}

    def labels(self, keys: Sequence[str]) -> np.ndarray:
        """Classes of these images."""
        return np.array([self.source.labels[key] for key in keys])

    def vectors(self, size: int) -> dict[str, np.ndarray]:
        """Key -> vector of every image of the split that can be read, at this size."""
        wanted = [key for part in PARTS for key in getattr(self.split, part)]
        store = embed(
            self.backbone,
            self.source,
            self.folder.path / "features",
            size=size,
            fit=self.recipe.fit,
            keys=wanted,
            workers=self.recipe.data.workers,
            max_unreadable=self.recipe.data.max_unreadable,
            quiet=self.quiet,
            notices=self.notices,
        )
        here = set(store.keys)
        keys = [key for key in wanted if key in here]
        rows = vectors(store.read(keys), self.recipe.features)
        return dict(zip(keys, rows, strict=True))


def open_task(
    recipe: TaskRecipe, folder: RunFolder, *, afresh: bool = False, quiet: bool = False
) -> Task:
    """Finds images, labels, split and backbone; refuses what cannot work before any work.

    Args:
        recipe: What to open.
        folder: Where the run lives, or will.
        afresh: Leave the split of a run that stands in the folder alone: it is to be replaced.
        quiet: No progress display later on.

    Raises:
        DataError, SplitLeakError, WeightsError, RecipeError: something does not fit.
    """
    notices = Notices()
    make_head(recipe)
    source = load_source(recipe.data, notices=notices)
    if not source.labels:
        raise DataError(
            f"{recipe.data.source} has no labels. Set data.labels to a CSV with the columns path "
            "and label, or to 'folder' where each class has its own folder."
        )
    written = folder.path / SPLIT
    if written.exists() and not afresh:
        split = read_split(written, keys=source.keys)
    elif recipe.split == "auto":
        labelled = [key for key in source.keys if key in source.labels]
        split = make_split(
            labelled, source.labels, source.groups, seed=recipe.seed, notices=notices
        )
    else:
        split = read_split(Path(recipe.split), keys=source.keys)
    nameless = [k for part in PARTS for k in getattr(split, part) if k not in source.labels]
    if nameless:
        raise DataError(
            f"{len(nameless)} images of the split have no label (first: {nameless[0]}). Label "
            "them, or leave them out of the split."
        )
    backbone = load_backbone(
        recipe.backbone, device=pick_device(recipe.device), seed=recipe.seed, notices=notices
    )
    return Task(recipe, folder, source, split, backbone, notices, quiet)


def make_head(recipe: TaskRecipe) -> Any:
    """An unfitted head with the recipe's options.

    Raises:
        UnknownNameError: there is no such head.
        RecipeError: it has no such option.
    """
    kind = find(HEADS, recipe.head)
    allowed = list(inspect.signature(kind).parameters)
    for name in recipe.head_options:
        if name not in allowed:
            raise RecipeError(
                f"The head '{recipe.head}' has no option '{name}'. It has: {', '.join(allowed)}."
            )
    return kind(**recipe.head_options)

"""What a run reads: bands, size and normalisation, resolved from a look at the images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_adapters.contracts import (
    RGB,
    BackboneInfo,
    Band,
    DataError,
    UnreadableFileError,
)
from dino_adapters.data import ImageSource, load_source
from dino_adapters.data.resize import shorter_side
from dino_adapters.data.splits import read_split
from dino_adapters.data.units import check_size, match_bands, to_model, to_range, valid_pixels
from dino_adapters.pretrain.sizes import largest_side
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices

LOOKS = 64
MOST_SHRUNK = 3
"""Times that images may be reduced without a warning: crops of one keep some of the details."""


class Intake:
    """The images of a run, and how they become tensors in 0..1.

    Up to 64 images, evenly spread, are read to learn the bands, a size and, for bands other than
    red, green and blue, mean and standard deviation.

    Args:
        source: the data set.
        recipe: the whole recipe.
        notices: where skips and conversions are counted.

    Attributes:
        side: shorter side in pixels at which images are read.
        size_note: why at that; empty where the recipe says it.
        shrunk: whether most of their details are lost by it.

    Raises:
        DataError: no image can be read, or their bands differ.
        UnitsError: the value range of 16-bit or float images is not given.
    """

    def __init__(self, source: ImageSource, recipe: PretrainRecipe, notices: Notices) -> None:
        self.source, self.notices = source, notices
        self.keys = source.keys
        if recipe.split is not None:
            self.keys = read_split(Path(recipe.split), keys=source.keys).train
        looks = look_at(source, self.keys)
        self.bands = common_bands([look.bands for look in looks])
        self.size_note = ""
        self.shrunk = False
        self.side = self._resolve_side(looks, recipe)
        self.mean, self.std = (None, None)
        if tuple(band.name for band in self.bands) != tuple(band.name for band in RGB):
            self.mean, self.std = band_statistics(source, [k.key for k in looks], self.bands)

    def decoder(self, info: BackboneInfo) -> Callable[[str], Tensor]:
        """A function from key to `(C, h, w)` in 0..1, the network's bands, shorter side = `side`.

        8-bit images come back as uint8, to fit more of them into memory; others as float32. Pixels
        without data hold the mean that the network's normalisation subtracts.
        """
        mean = torch.tensor(info.mean)[:, None, None]
        std = torch.tensor(info.std)[:, None, None]

        def decode(key: str) -> Tensor:
            sample = self.source.read(key)
            check_size(sample, info.patch_size)
            # There and back: normalising is the one road from files to networks, and views are
            # coloured before it.
            image = (to_model(sample, info, notices=self.notices) * std + mean).clamp_(0.0, 1.0)
            image = shorter_side(image, self.side)
            if sample.pixels.dtype == np.uint8:
                return (image * 255).round().to(torch.uint8)
            return image

        return decode

    def _resolve_side(self, looks: list[Look], recipe: PretrainRecipe) -> int:
        if recipe.data.image_size is not None:
            return recipe.data.image_size
        # So large that the smallest share of an image still fills the largest crop with pixels.
        wanted = math.ceil(largest_side(recipe) / math.sqrt(recipe.crops.global_scale[0]))
        there = int(statistics.median(look.side for look in looks))
        side = min(wanted, there)
        self.size_note = (
            f"images are read at {side} px: to fill the largest crop with pixels takes {wanted}, "
            f"the median image has {there}"
            + ("; smaller crops of it are enlarged" if there < wanted else "")
        )
        if there > MOST_SHRUNK * side:
            self.size_note += (
                f", so what is smaller than {math.ceil(there / side)} of its pixels is lost: cut "
                "large images into tiles, or raise crops.global_size"
            )
            self.shrunk = True
        return side


def count_images(recipe: PretrainRecipe, notices: Notices) -> int:
    """How many images a run reads: those of its split."""
    source = load_source(recipe.data, notices=notices)
    if recipe.split is None:
        return len(source.keys)
    return len(read_split(Path(recipe.split), keys=source.keys).train)


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of an image that was looked at."""

    key: str
    bands: tuple[Band, ...]
    side: int


def look_at(source: ImageSource, keys: Sequence[str], count: int = LOOKS) -> list[Look]:
    """Reads up to `count` images, evenly spread; their pixels are not kept.

    Raises:
        DataError: none of them can be read.
    """
    looks, reason = [], ""
    for key in evenly(keys, count):
        try:
            sample = source.read(key)
        except UnreadableFileError as error:
            reason = str(error)  # counted and named where it is read for good
            continue
        to_range(sample)  # an unknown range of values is refused here, before anything is spent
        looks.append(Look(key, sample.bands, min(sample.pixels.shape[-2:])))
    if not looks:
        raise DataError(f"None of the images looked at can be read (last: {reason}).")
    return looks


def evenly(keys: Sequence[str], count: int) -> list[str]:
    """At most so many of the keys, from all parts of their list."""
    count = min(count, len(keys))
    return [keys[index * len(keys) // count] for index in range(count)]


def common_bands(kinds: Sequence[tuple[Band, ...]]) -> tuple[Band, ...]:
    """The bands that a network for these images reads; grey among colour counts as colour.

    Raises:
        DataError: the images have different bands.
    """
    found = {tuple(band.name for band in bands): bands for bands in kinds}
    if len(found) > 1:
        found.pop(("grey",), None)
    if len(found) > 1:
        shown = "; ".join(", ".join(names) for names in sorted(found))
        raise DataError(
            f"The images have different bands ({shown}). Train on one kind at a time, or name the "
            "channels with data.bands."
        )
    return next(iter(found.values()))


def band_statistics(
    source: ImageSource, keys: Sequence[str], bands: tuple[Band, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every band in 0..1, over valid pixels of these images."""
    total = torch.zeros(len(bands), dtype=torch.float64)
    square, count = total.clone(), 0
    for key in keys:
        sample = source.read(key)
        indices = list(match_bands(sample.bands, bands))
        image = torch.from_numpy(to_range(sample)).double()[indices].flatten(1)
        valid = valid_pixels(sample)
        if valid is not None:
            image = image[:, torch.from_numpy(valid).flatten()]
        total += image.sum(dim=1)
        square += image.square().sum(dim=1)
        count += image.shape[1]
    mean = total / max(count, 1)
    std = (square / max(count, 1) - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())

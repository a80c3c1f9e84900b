"""Multi-crop: several random views of every image, made in batches on the device.

The order for each view is that of DINOv2 and DINOv3: crop and resize, mirror, colour, blur,
solarise, normalise.

A Gram crop is a global crop once more, at another size, for the Gram teacher (DINOv3, arXiv
2508.10104, section 4). The reference makes the larger of the two and resizes it to the smaller; an
undistorted Gram crop and its global crop are here both resized from the image itself, so that
turning Gram crops on leaves every other pixel as it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dino_adapters.contracts import BackboneInfo, RecipeError
from dino_adapters.pretrain.colour import jittered
from dino_adapters.pretrain.dice import Dice
from dino_adapters.pretrain.resample import apply_matrices, blur_matrices, crop_matrices
from dino_adapters.recipes.sections import CropsRecipe

LOGGER = logging.getLogger(__name__)
SOLARIZE_ABOVE = 128 / 255
ASPECT = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sides of the crops of one step, in pixels.

    Attributes:
        global_size: S, at least 1.
        local_size: s, at least 1.
        gram_size: S_g, at least 1; None makes no Gram crops.

    Raises:
        RecipeError: a side is below 1.
    """

    global_size: int
    local_size: int
    gram_size: int | None = None

    def __post_init__(self) -> None:
        """Refuses sides that no crop can have."""
        for name in ("global_size", "local_size", "gram_size"):
            side = getattr(self, name)
            if side is not None and side < 1:
                raise RecipeError(
                    f"{name} is {side}. A crop has a side of at least one pixel: give a multiple "
                    "of the patch size."
                )


@dataclass(frozen=True, slots=True)
class Crops:
    """Views of one step, crop-major: view i of image b is row `i * B + b`.

    Attributes:
        global_crops: `(G * B, C, S, S)` normalised floats.
        local_crops: `(L * B, C, s, s)`, or None without local crops.
        masks: bool `(G * B, N)`, True = hidden from the student, or None without iBOT.
        images: B.
        gram_crops: `(G * B, C, S_g, S_g)`: what the global crops show, for the Gram teacher; None
            without them.
        kin: int64 `(B,)`: images with the same number are near-duplicates, or of one group, and
            no neighbours for KoLeo; None looks at all.
        targets: what is known of the images, `(B,)` each, by guide.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor | None
    images: int
    gram_crops: Tensor | None = None
    kin: Tensor | None = None
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self, size: int | None) -> list[Crops]:
        """The same views, at most `size` images at a time, in the order of the images."""
        if size is None or size >= self.images:
            return [self]
        return [
            self._part(first, min(first + size, self.images))
            for first in range(0, self.images, size)
        ]

    def _part(self, first: int, end: int) -> Crops:
        def pick(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            return rows.unflatten(0, (-1, self.images))[:, first:end].flatten(0, 1)

        whole = pick(self.global_crops)
        assert whole is not None
        return Crops(
            whole,
            pick(self.local_crops),
            pick(self.masks),
            end - first,
            pick(self.gram_crops),
            None if self.kin is None else self.kin[first:end],
            {name: values[first:end] for name, values in self.targets.items()},
        )


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Where each view lies in its image: integers `(B,)`, and 1.0 where an axis is mirrored."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    upside_down: Tensor
    mirrored: Tensor

    def of(self, images: Tensor, size: int) -> Tensor:
        """The views `(B, C, size, size)` in 0..1 of images `(B, C, H, W)`."""
        rows = crop_matrices(self.top, self.height, images.shape[-2], size)
        columns = crop_matrices(self.left, self.width, images.shape[-1], size)
        rows = _flip_some(rows, self.upside_down).to(images.device)
        columns = _flip_some(columns, self.mirrored).to(images.device)
        return apply_matrices(images, rows, columns).clamp_(0.0, 1.0)


class MultiCrop:
    """Makes the views of a batch.

    Args:
        recipe: sizes, areas and probabilities.
        info: bands and normalisation of the network.
    """

    def __init__(self, recipe: CropsRecipe, info: BackboneInfo) -> None:
        self.recipe = recipe
        self.mean = torch.tensor(info.mean)[:, None, None]
        self.std = torch.tensor(info.std)[:, None, None]
        self.rgb = tuple(band.name for band in info.bands) == ("red", "green", "blue")
        if not self.rgb:
            LOGGER.warning(
                "The network reads %d band(s), not red, green, blue: saturation, hue, grayscale "
                "and solarise are off; every band gets a gain of its own instead.",
                len(info.bands),
            )

    def __call__(
        self,
        images: Tensor,
        dice: Dice,
        sizes: Sizes | None = None,
        *,
        distort_gram: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Global, local and Gram crops.

        Sizes and Gram crops change no draw: the same dice give the same boxes, mirroring and
        colours.

        Args:
            images: `(B, C, H, W)` in 0..1, on any device.
            dice: draws for these B images; the views do not depend on the device.
            sizes: sides of this step's crops; None takes the recipe's, without Gram crops.
            distort_gram: Gram crops get the colours, blur and solarisation of their global crops.
                Both are then resized from one view that has the larger of the two sizes, as in the
                reference. Otherwise Gram crops are cropped, mirrored and normalised only.

        Returns:
            Global crops `(G * B, C, S, S)`, local crops `(L * B, C, s, s)` or None, and Gram crops
            `(G * B, C, S_g, S_g)` or None, normalised. Gram crop i is global crop i.
        """
        r = self.recipe
        sizes = sizes or Sizes(r.global_size, r.local_size)
        first, other, local = r.blur
        pairs = [
            self._global_view(
                images,
                dice,
                sizes,
                blur=first if index == 0 else other,
                solarize=0.0 if index == 0 else r.solarize,
                distort_gram=distort_gram,
            )
            for index in range(r.global_count)
        ]
        local_crops = [
            self._distorted(
                self._cuts(images, r.local_scale, dice).of(images, sizes.local_size),
                dice,
                blur=local,
            )
            for _ in range(r.local_count)
        ]
        gram_crops = [gram for _, gram in pairs if gram is not None]
        return (
            torch.cat([view for view, _ in pairs]),
            torch.cat(local_crops) if local_crops else None,
            torch.cat(gram_crops) if gram_crops else None,
        )

    def _global_view(
        self,
        images: Tensor,
        dice: Dice,
        sizes: Sizes,
        *,
        blur: float,
        solarize: float,
        distort_gram: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """One global crop of every image `(B, C, S, S)`, and its Gram crop."""
        cuts = self._cuts(images, self.recipe.global_scale, dice)
        small, gram = sizes.global_size, sizes.gram_size
        large = max(small, gram) if gram is not None and distort_gram else small
        view = self._distorted(
            cuts.of(images, large),
            dice,
            blur=blur,
            solarize=solarize,
            enlarged=large / small,
        )
        if gram is None:
            return view, None
        if distort_gram:
            return _resized(view, small), _resized(view, gram)
        return view, self._normalised(cuts.of(images, gram))

    def _cuts(self, images: Tensor, scale: tuple[float, float], dice: Dice) -> _Cuts:
        r = self.recipe
        boxes = random_boxes(images.shape[-2:], scale, dice)
        none = torch.zeros(dice.count)
        mirrored = dice.coins(0.5) if r.horizontal_flip else none
        upside_down = dice.coins(0.5) if r.vertical_flip else none
        return _Cuts(*boxes, upside_down=upside_down, mirrored=mirrored)

    def _distorted(
        self,
        view: Tensor,
        dice: Dice,
        *,
        blur: float,
        solarize: float = 0.0,
        enlarged: float = 1.0,
    ) -> Tensor:
        """Colour, blur, solarisation and normalisation of views `(B, C, S, S)`.

        `enlarged` is the side of the view over that of the crop it stands for: the blur is told in
        pixels of the crop.
        """
        device = view.device
        view = jittered(view, self.recipe, dice, rgb=self.rgb)
        sigma = dice.uniform(self.recipe.blur_sigma) * dice.coins(blur)
        if blur > 0:
            # Variances add: repeated narrow blurs make a wide one, and nine taps stay enough.
            rounds = math.ceil(enlarged**2)
            matrices = blur_matrices(sigma * enlarged / math.sqrt(rounds), view.shape[-1])
            matrices = torch.linalg.matrix_power(matrices.to(device), rounds)
            view = apply_matrices(view, matrices, matrices)
        if self.rgb and solarize > 0:
            chosen = dice.coins(solarize).to(device)[:, None, None, None]
            view = torch.where((view >= SOLARIZE_ABOVE) & (chosen > 0), 1.0 - view, view)
        return self._normalised(view)

    def _normalised(self, view: Tensor) -> Tensor:
        return (view - self.mean.to(view.device)) / self.std.to(view.device)


def random_boxes(
    size: tuple[int, int] | torch.Size, scale: tuple[float, float], dice: Dice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes of random area and aspect ratio (3/4 to 4/3) inside an image.

    The first of ten draws that fits is taken; an image so narrow that none does gives its largest
    centred box within the aspect limits.

    Returns:
        top, left, height, width: integer `(count,)` each.
    """
    rows, columns = size
    area = rows * columns * dice.uniform(scale, TRIES)
    aspect = torch.exp(dice.uniform((math.log(ASPECT[0]), math.log(ASPECT[1])), TRIES))
    width = torch.sqrt(area * aspect).round().long()
    height = torch.sqrt(area / aspect).round().long()
    fits = (width > 0) & (width <= columns) & (height > 0) & (height <= rows)
    choice = fits.long().argmax(dim=1)
    chosen = torch.arange(dice.count)
    width, height, found = width[chosen, choice], height[chosen, choice], fits.any(dim=1)
    width = torch.where(found, width, min(columns, round(rows * ASPECT[1])))
    height = torch.where(found, height, min(rows, round(columns / ASPECT[0])))
    top = (dice.shares() * (rows - height + 1)).long()
    left = (dice.shares() * (columns - width + 1)).long()
    top = torch.where(found, top, (rows - height) // 2)
    left = torch.where(found, left, (columns - width) // 2)
    return top, left, height, width


def _resized(view: Tensor, size: int) -> Tensor:
    """Whole views `(B, C, S, S)` at another size, antialiased."""
    side = view.shape[-1]
    if side == size:
        return view
    matrix = crop_matrices(torch.tensor([0]), torch.tensor([side]), side, size).to(view.device)
    return apply_matrices(view, matrix, matrix)


def _flip_some(matrices: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None] > 0, matrices.flip(1), matrices)

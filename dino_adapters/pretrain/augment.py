"""Multi-crop: several random views of every image, made in batches on the device.

The order for each view is that of DINOv2 and DINOv3: crop and resize, mirror, colour, blur,
solarise, normalise. Colour jitter is one affine map of the bands per view, so that the four
jitters and the loss of colour cost a single small product.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_adapters.contracts import BackboneInfo
from dino_adapters.pretrain.resample import apply_matrices, blur_matrices, crop_matrices
from dino_adapters.recipes.pretrain import CropsRecipe

LOGGER = logging.getLogger(__name__)
LUMA = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
BAND_GAIN = 0.1
SOLARIZE_ABOVE = 128 / 255
ASPECT = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True, slots=True)
class Crops:
    """Views of one step, crop-major: view i of image b is row `i * B + b`.

    Attributes:
        global_crops: `(G * B, C, S, S)` normalised floats.
        local_crops: `(L * B, C, s, s)`, or None without local crops.
        masks: bool `(G * B, N)`, True = hidden from the student, or None without iBOT.
        images: B.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor | None
    images: int


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

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Global and local crops.

        Args:
            images: `(B, C, H, W)` in 0..1, on any device.
            generator: CPU generator; the views do not depend on the device.

        Returns:
            Global crops `(G * B, C, S, S)` and local crops `(L * B, C, s, s)` or None, normalised.
        """
        r = self.recipe
        first, other, local = r.blur
        global_crops = [
            self._view(
                images,
                generator,
                size=r.global_size,
                scale=r.global_scale,
                blur=first if index == 0 else other,
                solarize=0.0 if index == 0 else r.solarize,
            )
            for index in range(r.global_count)
        ]
        local_crops = [
            self._view(images, generator, size=r.local_size, scale=r.local_scale, blur=local)
            for _ in range(r.local_count)
        ]
        return torch.cat(global_crops), torch.cat(local_crops) if local_crops else None

    def _view(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        size: int,
        scale: tuple[float, float],
        blur: float,
        solarize: float = 0.0,
    ) -> Tensor:
        count, device = len(images), images.device
        top, left, height, width = random_boxes(count, images.shape[-2:], scale, generator)
        rows = crop_matrices(top, height, images.shape[-2], size)
        columns = crop_matrices(left, width, images.shape[-1], size)
        if self.recipe.horizontal_flip:
            columns = _flip_some(columns, generator)
        if self.recipe.vertical_flip:
            rows = _flip_some(rows, generator)
        view = apply_matrices(images, rows.to(device), columns.to(device)).clamp_(0.0, 1.0)
        view = self._colour(view, generator)
        sigma = _uniform(count, self.recipe.blur_sigma, generator) * _coins(count, blur, generator)
        if blur > 0:
            matrices = blur_matrices(sigma, size).to(device)
            view = apply_matrices(view, matrices, matrices)
        if self.rgb and solarize > 0:
            chosen = _coins(count, solarize, generator).to(device)[:, None, None, None]
            view = torch.where((view >= SOLARIZE_ABOVE) & (chosen > 0), 1.0 - view, view)
        return (view - self.mean.to(device)) / self.std.to(device)

    def _colour(self, view: Tensor, generator: torch.Generator) -> Tensor:
        count, bands = view.shape[:2]
        jittered = _coins(count, self.recipe.jitter, generator)
        bright = 1 + _uniform(count, (-BRIGHTNESS, BRIGHTNESS), generator) * jittered
        contrast = 1 + _uniform(count, (-CONTRAST, CONTRAST), generator) * jittered
        if self.rgb:
            saturation = 1 + _uniform(count, (-SATURATION, SATURATION), generator) * jittered
            hue = _uniform(count, (-HUE, HUE), generator) * jittered * (2 * math.pi)
            # Without colour, whatever the saturation was.
            saturation = saturation * (1 - _coins(count, self.recipe.grayscale, generator))
            mix = chroma_matrices(saturation, hue)
            weights = torch.tensor(LUMA)
        else:
            gains = 1 + (torch.rand(count, bands, generator=generator) * 2 - 1) * BAND_GAIN
            mix = torch.diag_embed(1 + (gains - 1) * jittered[:, None])
            weights = torch.full((bands,), 1 / bands)
        mix = (mix * (bright * contrast)[:, None, None]).to(view.device)
        grey = torch.einsum("bchw,c->b", view, weights.to(view.device)) / view[0, 0].numel()
        # Contrast turns about the mean grey of the brightened view.
        shift = (bright * (1 - contrast)).to(view.device) * grey
        flat = torch.baddbmm(shift[:, None, None], mix, view.flatten(2))
        return flat.view_as(view).clamp_(0.0, 1.0)


def chroma_matrices(saturation: Tensor, hue: Tensor) -> Tensor:
    """Colour maps that scale the distance to grey and turn about the grey axis; luma is kept.

    The turn is the linear stand-in for a hue shift in HSV: one product instead of a conversion
    there and back.

    Args:
        saturation: factor `(B,)`; 0 gives grey.
        hue: angle in radians `(B,)`.

    Returns:
        `(B, 3, 3)`; maps grey pixels to themselves.
    """
    axis = torch.full((3,), 1 / math.sqrt(3.0))
    cross = torch.tensor(
        [[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]]
    )
    cos, sin = torch.cos(hue)[:, None, None], torch.sin(hue)[:, None, None]
    turn = cos * torch.eye(3) + sin * cross + (1 - cos) * torch.outer(axis, axis)
    luma = torch.tensor(LUMA).expand(3, 3)
    chroma = turn - luma @ turn  # colour after the turn, less its own luma
    return luma + saturation[:, None, None] * chroma


def random_boxes(
    count: int,
    size: tuple[int, int] | torch.Size,
    scale: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes of random area and aspect ratio (3/4 to 4/3) inside an image.

    The first of ten draws that fits is taken; an image so narrow that none does gives its largest
    centred box within the aspect limits.

    Returns:
        top, left, height, width: integer `(count,)` each.
    """
    rows, columns = size
    area = rows * columns * _uniform(count * TRIES, scale, generator)
    aspect = torch.exp(
        _uniform(count * TRIES, (math.log(ASPECT[0]), math.log(ASPECT[1])), generator)
    )
    width = torch.sqrt(area * aspect).round().long().view(count, TRIES)
    height = torch.sqrt(area / aspect).round().long().view(count, TRIES)
    fits = (width > 0) & (width <= columns) & (height > 0) & (height <= rows)
    choice = fits.long().argmax(dim=1)
    chosen = torch.arange(count)
    width, height, found = width[chosen, choice], height[chosen, choice], fits.any(dim=1)
    width = torch.where(found, width, min(columns, round(rows * ASPECT[1])))
    height = torch.where(found, height, min(rows, round(columns / ASPECT[0])))
    top = (torch.rand(count, generator=generator) * (rows - height + 1)).long()
    left = (torch.rand(count, generator=generator) * (columns - width + 1)).long()
    top = torch.where(found, top, (rows - height) // 2)
    left = torch.where(found, left, (columns - width) // 2)
    return top, left, height, width


def _flip_some(matrices: Tensor, generator: torch.Generator) -> Tensor:
    chosen = _coins(len(matrices), 0.5, generator)[:, None, None] > 0
    return torch.where(chosen, matrices.flip(1), matrices)


def _uniform(count: int, span: tuple[float, float], generator: torch.Generator) -> Tensor:
    return span[0] + (span[1] - span[0]) * torch.rand(count, generator=generator)


def _coins(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """1.0 with the probability, else 0.0; always draws, so that later draws stay where they are."""
    return (torch.rand(count, generator=generator) < probability).float()

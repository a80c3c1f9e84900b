"""Images to one size: bicubic with antialiasing, then a centre crop or a squash."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_adapters.contracts import ShapeError

Fit = Literal["crop", "squash"]


def unit_range(image: Tensor) -> Tensor:
    """float32 in 0..1 of uint8, or of floats that are there already; any shape."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def shorter_side(image: Tensor, size: int) -> Tensor:
    """Scales an image so that its shorter side has `size` pixels; the aspect ratio stays.

    Args:
        image: float `(C, H, W)`, any range.
        size: Wanted length of the shorter side in pixels.

    Returns:
        `(C, H', W')` with min(H', W') = size; the image itself if that is its size already.

    Raises:
        ShapeError: not a float image of three axes with pixels in it, or size below 1.
    """
    _check(image, size)
    height, width = image.shape[-2:]
    short = min(height, width)
    # The longer side is rounded to whole pixels; the distortion is below half a pixel.
    return _scale(image, round(height * size / short), round(width * size / short))


def to_square(image: Tensor, size: int, fit: str = "crop") -> Tensor:
    """An image as a square.

    Args:
        image: float `(C, H, W)`, any range.
        size: Side of the square in pixels.
        fit: `crop` scales the shorter side to `size` and cuts out the centre; `squash` scales both
            sides to `size`, so nothing is cut off and shapes are distorted.

    Returns:
        `(C, size, size)`.

    Raises:
        ShapeError: not a float image of three axes with pixels in it, or an unknown fit.
    """
    _check(image, size)
    if fit == "squash":
        return _scale(image, size, size)
    if fit != "crop":
        raise ShapeError(f"fit is '{fit}'. Choose crop or squash.")
    image = shorter_side(image, size)
    height, width = image.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[:, top : top + size, left : left + size]


def _scale(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    # Without antialiasing a bicubic reduction skips pixels, and frozen features suffer for it.
    scaled = F.interpolate(
        image[None], size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )[0]
    # Bicubic weights overshoot at edges; images that were in 0..1 stay there, as in any 8-bit road.
    if bool((image.amin() >= 0.0) & (image.amax() <= 1.0)):
        scaled = scaled.clamp(0.0, 1.0)
    return scaled


def _check(image: Tensor, size: int) -> None:
    if image.ndim != 3 or not torch.is_floating_point(image) or 0 in image.shape or size < 1:
        raise ShapeError(
            f"Resizing got a {image.dtype} tensor of shape {tuple(image.shape)} and size {size}. "
            "It needs a float image (C, H, W) with pixels in it, and a size of 1 or more."
        )

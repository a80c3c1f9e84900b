"""Colour jitter as one affine map of the bands per view.

The four jitters and the loss of colour cost a single small product, on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dino_adapters.pretrain.dice import Dice
from dino_adapters.recipes.sections import CropsRecipe

LUMA = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
BAND_GAIN = 0.1


def jittered(view: Tensor, recipe: CropsRecipe, dice: Dice, *, rgb: bool) -> Tensor:
    """Brightness, contrast, saturation and hue jitter, and the loss of colour.

    Args:
        view: `(B, C, S, S)` in 0..1, on any device.
        recipe: the probabilities `jitter` and `grayscale`.
        dice: draws for these B images.
        rgb: the bands are red, green, blue; others get a gain of their own instead of saturation,
            hue and the loss of colour.

    Returns:
        `(B, C, S, S)` in 0..1.
    """
    bands = view.shape[1]
    chosen = dice.coins(recipe.jitter)
    bright = 1 + dice.uniform((-BRIGHTNESS, BRIGHTNESS)) * chosen
    contrast = 1 + dice.uniform((-CONTRAST, CONTRAST)) * chosen
    if rgb:
        saturation = 1 + dice.uniform((-SATURATION, SATURATION)) * chosen
        hue = dice.uniform((-HUE, HUE)) * chosen * (2 * math.pi)
        # Without colour, whatever the saturation was.
        saturation = saturation * (1 - dice.coins(recipe.grayscale))
        mix = chroma_matrices(saturation, hue)
        weights = torch.tensor(LUMA)
    else:
        gains = 1 + dice.uniform((-1.0, 1.0), bands) * BAND_GAIN
        mix = torch.diag_embed(1 + (gains - 1) * chosen[:, None])
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

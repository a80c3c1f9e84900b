"""Images of any number of bands into patch tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dino_adapters.contracts import ShapeError


def check_images(images: Tensor, *, channels: int, multiple: int) -> tuple[int, int]:
    """Refuses images that the network would crop or misread.

    Args:
        images: `(B, C, H, W)`.
        channels: C that the network reads.
        multiple: Pixels that must divide H and W.

    Returns:
        `(H / multiple, W / multiple)`.

    Raises:
        ShapeError: other dimensions, C, H or W; the message names the nearest size.
    """
    if images.ndim != 4:
        raise ShapeError(
            f"The images have shape {tuple(images.shape)}. A batch (B, C, H, W) is expected: "
            "add the missing dimension, e.g. with image[None]."
        )
    _, found, height, width = images.shape
    if found != channels:
        raise ShapeError(
            f"The images have {found} channels, the network reads {channels}. Match the bands "
            "(data.units.to_model does), or load the network with `bands=`."
        )
    if height % multiple or width % multiple or not height or not width:
        near = [
            max(multiple, math.floor(side / multiple + 0.5) * multiple) for side in (height, width)
        ]
        raise ShapeError(
            f"The images are {height} x {width} pixels; both sides must be multiples of "
            f"{multiple}. The nearest size is {near[0]} x {near[1]}: resize or crop to it."
        )
    return height // multiple, width // multiple


class PatchEmbed(nn.Module):
    """One linear map from the pixels of a patch to its token (arXiv 2010.11929)."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weight and bias uniform in ±sqrt(1 / pixels of a patch in all bands)."""
        bound = math.sqrt(1.0 / self.proj.weight[0].numel())
        nn.init.uniform_(self.proj.weight, -bound, bound, generator=generator)
        assert self.proj.bias is not None
        nn.init.uniform_(self.proj.bias, -bound, bound, generator=generator)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of a batch.

        Args:
            images: `(B, C, H, W)`.

        Returns:
            Tokens `(B, N, D)`, row-major, and the grid `(h, w)`.

        Raises:
            ShapeError: see `check_images`.
        """
        grid = check_images(
            images, channels=self.proj.in_channels, multiple=self.proj.kernel_size[0]
        )
        return self.proj(images).flatten(2).mT, grid

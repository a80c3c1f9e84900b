"""Learned positions (ViT, arXiv 2010.11929): one table, resampled to the grid of each crop."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def table_side(length: int) -> int | None:
    """G of a table with `1 + G * G` entries, CLS first; None if no G fits."""
    side = math.isqrt(max(length - 1, 0))
    return side if side and side * side == length - 1 else None


def resample_table(table: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The positions of CLS and of every patch of a grid.

    Bicubic, as DINO and DINOv2 train (arXiv 2104.14294, 2304.07193): neither antialiased nor
    aligned at the corners. Their code enlarges the wanted grid by 0.1 for rounding's sake; the
    exact sizes are used here. At the table's own grid it comes back as it is.

    Args:
        table: `(1, 1 + side * side, D)`, CLS first, then row-major.
        side: Patches per side of the grid that the table is for.
        grid: `(h, w)` wanted.

    Returns:
        `(1, 1 + h * w, D)`, in the table's dtype; computed in float32 or better.
    """
    if grid == (side, side):
        return table
    square = table[:, 1:].mT.unflatten(-1, (side, side))
    wide = square.to(torch.promote_types(table.dtype, torch.float32))
    moved = F.interpolate(wide, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], moved.flatten(2).mT.to(table.dtype)], dim=1)

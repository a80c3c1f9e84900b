"""Cropping, resizing, mirroring and blurring whole batches at once, as two matrix products.

Each of these operations is linear and separable: `out = rows @ image @ columnsᵀ` with one small
matrix per image and axis. One batched product therefore serves any number of bands, on any device,
with a crop of its own for every image, and a second output size of the same crop is another pair of
matrices of the same geometry.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUBIC = -0.5  # the kernel of Pillow and of torch's antialiased bicubic
BLUR_TAPS = 9


def apply_matrices(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ image @ columnsᵀ` for every band.

    Args:
        images: `(B, C, H, W)`.
        rows: `(B, h, H)`.
        columns: `(B, w, W)`.

    Returns:
        `(B, C, h, w)`.
    """
    return rows[:, None] @ images @ columns.mT[:, None]


def crop_matrices(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """Antialiased bicubic resizing of a segment of each axis.

    Equals cropping first and then `interpolate(mode="bicubic", antialias=True)`: pixels outside the
    segment have no weight.

    Args:
        start: first pixel of each segment, integer `(B,)`.
        length: pixels of each segment, integer `(B,)`.
        size_in: pixels of the axis.
        size_out: pixels wanted.

    Returns:
        float32 `(B, size_out, size_in)`, rows sum to one.
    """
    scale = (length / size_out)[:, None, None].double()
    reach = scale.clamp(min=1.0)
    first, count = start[:, None, None], length[:, None, None]
    centres = first + (torch.arange(size_out, device=start.device)[None, :, None] + 0.5) * scale
    pixels = torch.arange(size_in, device=start.device)[None, None, :]
    weights = _cubic((pixels + 0.5 - centres) / reach)
    weights = weights * ((pixels >= first) & (pixels < first + count))
    return (weights / weights.sum(dim=2, keepdim=True)).float()


def blur_matrices(sigma: Tensor, size: int) -> Tensor:
    """Gaussian blur with 9 taps and mirrored borders.

    Args:
        sigma: standard deviation in pixels `(B,)`; 0 leaves the image as it is.
        size: pixels of the axis.

    Returns:
        float32 `(B, size, size)`, rows sum to one.
    """
    reach = min(BLUR_TAPS // 2, size - 1)
    taps = torch.arange(-reach, reach + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    places = torch.arange(size, device=sigma.device)[:, None] + taps[None, :]
    places = places.abs()
    places = torch.where(places >= size, 2 * (size - 1) - places, places)
    matrices = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrices.scatter_add_(
        2,
        places.expand(len(sigma), -1, -1),
        weights[:, None, :].expand(-1, size, -1),
    )


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, zero from 2 on."""
    x = x.abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))

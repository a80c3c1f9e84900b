"""Block masks over patches (BEiT, arXiv 2106.08254, algorithm 1), with DINOv3's counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

LEAST_BLOCK = 4
ASPECT = (0.3, 1 / 0.3)
TRIES = 10


class MaskDraws(Protocol):
    """Where the random numbers of masks come from; `random.Random` is one, tests replay others."""

    def uniform(self, a: float, b: float) -> float:
        """A float between a and b, whichever is larger."""
        ...

    def randint(self, a: int, b: int) -> int:
        """An integer from a to b, both included."""
        ...

    def sample(self, population: Sequence[int], k: int) -> list[int]:
        """As many different members."""
        ...

    def shuffle(self, x: list[Tensor]) -> None:
        """Shuffles in place."""
        ...


def block_masks(
    crops: int,
    grid: tuple[int, int],
    draws: MaskDraws,
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    most: int | None = None,
    bins: Literal["edges", "uniform"] = "edges",
    shift: bool = False,
) -> Tensor:
    """Masks for all global crops of a step.

    `floor(crops * probability)` of them are masked. `ratio` is cut into as many bins of equal
    width, and masked crop j hides exactly `floor(N * r)` patches with r from bin j: its upper edge
    (DINOv3: the total is the same in every step), or a uniform draw (DINOv2, arXiv 2304.07193).
    Draw them for the whole step: with upper edges the mean ratio of a single masked crop is the
    largest one. Which crops are masked is independent of the image.

    Order of the draws, masked crops first and from the smallest bin: r where it is drawn, for each
    block its area, aspect and, if it is smaller than the grid, its top and left, then the single
    patches that complete the count, then the rows and columns of the shift. For every other crop a
    completion of none. At last the order of the crops.

    Args:
        crops: global crops of the step.
        grid: patches per column and row, `(h, w)`.
        draws: the random numbers.
        probability: share of crops that are masked.
        ratio: smallest and largest masked share of a crop.
        most: largest block in patches; None is half of the grid, see `reference_block_limit`.
        bins: where in its bin the ratio of a crop lies.
        shift: rolls every mask by a random number of rows and columns, so that the border, which
            few blocks reach, is hidden as often as the centre.

    Returns:
        bool `(crops, h * w)`, row-major, True = hidden.
    """
    cells = grid[0] * grid[1]
    most = cells // 2 if most is None else most
    masked = int(crops * probability)
    edges: list[float] = torch.linspace(ratio[0], ratio[1], masked + 1).tolist()
    masks: list[Tensor] = []
    for low, high in itertools.pairwise(edges):
        share = draws.uniform(low, high) if bins == "uniform" else high
        mask = _one_mask(int(cells * share), grid, draws, most)
        if shift:
            moved = draws.randint(0, grid[0] - 1), draws.randint(0, grid[1] - 1)
            mask = mask.view(grid).roll(moved, dims=(0, 1)).flatten()
        masks.append(mask)
    masks += [_one_mask(0, grid, draws, most) for _ in range(crops - masked)]
    draws.shuffle(masks)
    return torch.stack(masks)


def reference_block_limit(size_px: int, patch: int) -> int:
    """The reference's largest block in patches, less than half of a grid with an odd side.

    `0.5 * size_px // patch * size_px // patch` from left to right: 21 patches, not 24, for 7 x 7.

    Args:
        size_px: side of the global crop in pixels.
        patch: side of a patch in pixels.
    """
    return int(0.5 * size_px // patch * size_px // patch)


def mask_weights(masks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`1 / (masked patches of its crop)` for each masked patch, in row-major order.

    Args:
        masks: bool `(crops, N)`.
        dtype: of the weights.

    Returns:
        `(M,)`.
    """
    counts = masks.sum(dim=1, keepdim=True).clamp(min=1)
    return counts.to(dtype).reciprocal().expand_as(masks)[masks]


def _one_mask(count: int, grid: tuple[int, int], draws: MaskDraws, most: int) -> Tensor:
    mask = torch.zeros(grid, dtype=torch.bool)
    filled = 0
    while filled < count:
        added = _add_block(mask, min(count - filled, most), draws)
        if not added:
            break
        filled += added
    flat = mask.flatten()
    # Single patches bring the count to exactly what was asked for.
    free = (~flat).nonzero().flatten().tolist()
    flat[draws.sample(free, count - filled)] = True
    return flat


def _add_block(mask: Tensor, limit: int, draws: MaskDraws) -> int:
    height, width = mask.shape
    for _ in range(TRIES):
        area = draws.uniform(LEAST_BLOCK, limit)
        aspect = math.exp(draws.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = draws.randint(0, height - h), draws.randint(0, width - w)
        block = mask[top : top + h, left : left + w]
        new = h * w - int(block.sum())
        if 0 < new <= limit:
            block.fill_(True)
            return new
    return 0

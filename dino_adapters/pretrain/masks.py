"""Block masks over patches (BEiT, arXiv 2106.08254, algorithm 1), with DINOv3's counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

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
) -> Tensor:
    """Masks for all global crops of a step.

    `floor(crops * probability)` of them are masked; masked crop j hides exactly
    `floor(N * r[j + 1])` patches with r spread evenly over `ratio`, so that the total is the same
    in every step. Draw them for the whole step: for single crops the mean ratio rises to the upper
    end. Which crops are masked is independent of the image.

    Args:
        crops: global crops of the step.
        grid: patches per column and row, `(h, w)`.
        draws: the random numbers.
        probability: share of crops that are masked.
        ratio: smallest and largest masked share of a crop.
        most: largest block in patches; None is half of the grid.

    Returns:
        bool `(crops, h * w)`, row-major, True = hidden.
    """
    cells = grid[0] * grid[1]
    most = cells // 2 if most is None else most
    masked = int(crops * probability)
    edges = torch.linspace(ratio[0], ratio[1], masked + 1)
    counts = [int(cells * edges[j + 1].item()) for j in range(masked)]
    masks = [_one_mask(count, grid, draws, most) for count in counts]
    masks += [_one_mask(0, grid, draws, most) for _ in range(crops - masked)]
    draws.shuffle(masks)
    return torch.stack(masks)


def mask_weights(masks: Tensor) -> Tensor:
    """`1 / (masked patches of its crop)` for each masked patch, in row-major order.

    Args:
        masks: bool `(crops, N)`.

    Returns:
        float32 `(M,)`.
    """
    counts = masks.sum(dim=1, keepdim=True).clamp(min=1)
    return (1.0 / counts).expand_as(masks)[masks]


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

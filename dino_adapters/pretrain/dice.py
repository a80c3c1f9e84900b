"""Draws for every image of a batch, made on the CPU so that no device changes them."""

from __future__ import annotations

import torch
from torch import Tensor


class Dice:
    """Draws for some images of a batch, the same wherever the others are.

    Numbers are drawn for the whole batch and this part's are kept, so that an image gets the same
    views however a batch is divided over devices.

    Args:
        generator: CPU generator.
        total: images of the whole batch.
        first: number of this part's first image in it.
        count: images of this part; None is the rest.
    """

    def __init__(
        self, generator: torch.Generator, total: int, first: int = 0, count: int | None = None
    ) -> None:
        self.generator, self.total = generator, total
        self.rows = slice(first, total if count is None else first + count)
        self.count = total - first if count is None else count

    def shares(self, *shape: int) -> Tensor:
        """Numbers `(count, *shape)` from 0 to 1."""
        return torch.rand(self.total, *shape, generator=self.generator)[self.rows]

    def uniform(self, span: tuple[float, float], *shape: int) -> Tensor:
        """Numbers `(count, *shape)` from `span[0]` to `span[1]`."""
        return span[0] + (span[1] - span[0]) * self.shares(*shape)

    def coins(self, probability: float) -> Tensor:
        """1.0 with the probability, else 0.0: `(count,)`.

        Always draws, so that later draws stay where they are.
        """
        return (self.shares() < probability).float()

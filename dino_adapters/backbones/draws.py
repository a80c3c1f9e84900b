"""Where the random numbers of a forward pass come from: one source, which tests can replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """Random numbers that a network in train mode asks for, one after the other.

    The order is part of the method (arXiv 2508.10104). For each block of a ViT: for each group of
    crops the rotary augmentation (shift 2, jitter 2, rescale 1; those that are off draw nothing);
    then one permutation for each group (attention), then one for each group (feed-forward).
    """

    def uniform(self, low: float, high: float, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """Uniform numbers in [low, high) of `shape`, with the dtype and device of `like`."""
        ...

    def permutation(self, count: int, *, device: torch.device) -> Tensor:
        """A random order of 0..count-1, int64 `(count,)`."""
        ...


class RandomDraws:
    """Draws from a generator, or from the global one of the tensor's device.

    With a generator of its own, a forward pass is a function of that generator's state: hand in a
    freshly seeded one before each step (`network.set_draws(RandomDraws(chance.generator(seed,
    "network", step, rank)))`) and a resumed run repeats an uninterrupted one. A CPU generator
    serves every device, and gives all of them the same numbers.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """See `Draws.uniform`; drawn in the dtype of `like`, so bfloat16 draws are coarse."""
        where = like.device if self.generator is None else self.generator.device
        numbers = torch.empty(tuple(shape), dtype=like.dtype, device=where)
        return numbers.uniform_(low, high, generator=self.generator).to(like.device)

    def permutation(self, count: int, *, device: torch.device) -> Tensor:
        """See `Draws.permutation`."""
        where = device if self.generator is None else self.generator.device
        return torch.randperm(count, generator=self.generator, device=where).to(device)

"""Draws for every image of a batch, made on the CPU so that no device changes them."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(count: int, span: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Numbers `(count,)` from `span[0]` to `span[1]`."""
    return span[0] + (span[1] - span[0]) * torch.rand(count, generator=generator)


def coins(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """1.0 with the probability, else 0.0: `(count,)`.

    Always draws, so that later draws stay where they are.
    """
    return (torch.rand(count, generator=generator) < probability).float()

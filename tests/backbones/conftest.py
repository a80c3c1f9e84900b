"""Networks with weights that are random everywhere, so that no tensor can go astray unseen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZES = ((48, 80), (112, 64))


@pytest.fixture(scope="session")
def scatter() -> Callable[..., Any]:
    """Gives every parameter a random value of a useful size; norms and gains lie around 1."""

    def _scatter(network: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(network.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim >= 2 and "token" not in name:
                    parameter.copy_(noise / parameter[0].numel() ** 0.5)
                elif "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.3 * noise)
                elif any(word in name for word in ("gamma", "lambda", "downsample_layers.0.1.w")):
                    parameter.copy_(0.7 + 0.2 * noise)
                else:
                    parameter.copy_(0.5 * noise)
        return network.eval()

    return _scatter


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def images(request: pytest.FixtureRequest) -> Tensor:
    """A batch of two, not square."""
    return torch.randn(2, 3, *request.param, generator=torch.Generator().manual_seed(5))

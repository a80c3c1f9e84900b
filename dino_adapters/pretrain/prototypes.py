"""Projection heads: from tokens to scores over learned prototypes."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """MLP, L2 normalisation, then a linear layer of K prototypes (DINO, arXiv 2104.14294, C).

    DINOv3's prototypes are a plain linear layer: their norms are free and act as a learned inverse
    temperature.

    Args:
        in_dim: D of the tokens.
        prototypes: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width before the prototypes.
        layers: linear layers before the prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            steps += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*steps[:-1])
        self.last_layer = nn.Linear(bottleneck_dim, prototypes, bias=False)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator, *, prototype_norm: float | None = None
    ) -> None:
        """Truncated normal of deviation 0.02 for all weights, prototypes included; biases 0.

        Args:
            generator: source of the draws.
            prototype_norm: scales every prototype to this length. At the plain start it is
                0.02 * sqrt(bottleneck_dim), which makes targets nearly uniform for a long time.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if prototype_norm is not None:
            rows = self.last_layer.weight
            rows.copy_(F.normalize(rows, dim=1) * prototype_norm)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `(..., K)` of tokens `(..., D)`."""
        x = self.mlp(tokens)
        # fp16 cannot hold 1e-12; fp32 and bf16 can.
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return self.last_layer(x)

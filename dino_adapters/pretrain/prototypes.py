"""Projection heads: from tokens to scores over learned prototypes."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dino_adapters.contracts import RecipeError

GAIN = "parametrizations.weight.original0"
"""Name of the gains `(K, 1)` in a weight-normalised layer."""
DIRECTION = "parametrizations.weight.original1"
"""Name of the vectors `(K, bottleneck)` whose length does not matter there."""


class ProjectionHead(nn.Module):
    """MLP, L2 normalisation, then a linear layer of K prototypes (DINO, arXiv 2104.14294, C).

    DINOv3's prototypes are a plain linear layer: their norms are free and act as a learned inverse
    temperature. DINO and DINOv2 write a prototype as gain times direction (weight normalisation,
    arXiv 1602.07868) with a gain of 1 at the start, DINO with a gain that stays there.

    Args:
        in_dim: D of the tokens.
        prototypes: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width before the prototypes.
        layers: linear layers before the prototypes, at least 1.
        weight_norm: `none` for plain prototypes, `free` and `fixed` for weight-normalised ones
            whose gain is trained or not.

    Raises:
        RecipeError: `layers` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        weight_norm: Literal["none", "free", "fixed"] = "none",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise RecipeError(f"A head has {layers} layers. Give it at least 1.")
        self.weight_norm = weight_norm
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            steps += [nn.Linear(before, after), nn.GELU()]
        # A single layer is called `mlp`, without a number, as in files of the reference.
        self.mlp = steps[0] if layers == 1 else nn.Sequential(*steps[:-1])
        self.last_layer = nn.Linear(bottleneck_dim, prototypes, bias=False)
        if weight_norm != "none":
            parametrizations.weight_norm(self.last_layer, dim=0)
            gain = self.last_layer.get_parameter(GAIN).requires_grad_(weight_norm == "free")
            nn.init.ones_(gain)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator, *, prototype_norm: float | None = None
    ) -> None:
        """Truncated normal of deviation 0.02 for all weights, prototypes included; biases 0.

        Args:
            generator: source of the draws.
            prototype_norm: scales every prototype to this length. None leaves plain prototypes at
                0.02 * sqrt(bottleneck_dim), which makes targets nearly uniform for a long time, and
                gives weight-normalised ones the length 1.
        """
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        plain = self.weight_norm == "none"
        rows = self.last_layer.get_parameter("weight" if plain else DIRECTION)
        nn.init.trunc_normal_(rows, std=0.02, generator=generator)
        if not plain:
            length = 1.0 if prototype_norm is None else prototype_norm
            self.last_layer.get_parameter(GAIN).fill_(length)
        elif prototype_norm is not None:
            rows.copy_(F.normalize(rows, dim=1) * prototype_norm)

    def trunk(self, tokens: Tensor) -> Tensor:
        """Bottleneck `(..., bottleneck_dim)` of tokens `(..., D)`, before its normalisation."""
        return self.mlp(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        """Bottleneck `(..., bottleneck_dim)` of length 1, in float32 or better."""
        x = self.trunk(tokens)
        # Also under bf16: a bottleneck is small, and rounding its length would scale all scores.
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12)

    def scores(self, bottleneck: Tensor) -> Tensor:
        """Scores `(..., K)` of a normalised bottleneck, in the dtype of the prototypes."""
        dtype = next(self.last_layer.parameters()).dtype
        return self.last_layer(bottleneck.to(dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `(..., K)` of tokens `(..., D)`."""
        return self.scores(self.project(tokens))

"""ConvNeXt (arXiv 2201.03545) with DINOv3's tokens: the class token is the pooled map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_adapters.backbones.blocks import WEIGHT_STD, pick_layers
from dino_adapters.backbones.config import ConvNeXtConfig
from dino_adapters.backbones.draws import Draws, RandomDraws
from dino_adapters.backbones.patch import check_images
from dino_adapters.contracts import Features, ShapeError

NORM_EPS = 1e-6
STRIDE = 32
"""Pixels per side of one cell of the last map: 4 in the stem, then three times 2."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map `(B, C, H, W)`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises dimension 1."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, norm, and a two-layer perceptron per cell, added back with a gain."""

    def __init__(self, dim: int, *, layerscale: float | None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.layerscale = layerscale
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layerscale)) if layerscale else None

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        """`(B, C, H, W)` to the same; each row of the batch skips it with chance `drop_path`."""
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(F.gelu(self.pwconv1(branch)))
        if self.gamma is not None:
            branch = branch * self.gamma
        branch = branch.permute(0, 3, 1, 2)
        if self.training and self.drop_path > 0.0:
            kept = draws.uniform(0.0, 1.0, (len(x), 1, 1, 1), like=x) >= self.drop_path
            branch = branch * kept / (1.0 - self.drop_path)
        return x + branch


class ConvNeXt(nn.Module):
    """A trainable ConvNeXt that returns `Features`; satisfies `contracts.Network`.

    It cannot hide patches: masks are refused. Random numbers (stochastic depth, in train mode)
    come from `self.draws`, as in `VisionTransformer`.

    Args:
        config: The architecture.
        drop_path: Chance that a row skips the last block; it rises linearly from 0 at the first.

    Attributes:
        config: As given.
        embed_dim: D, width of the last stage.
        patch_size: 32, pixels per side of one cell of the last map.
        num_registers: 0.
        depth: Number of stages.
        supports_masks: False.
        draws: Source of random numbers.
    """

    patch_size = STRIDE
    num_registers = 0
    supports_masks = False

    def __init__(self, config: ConvNeXtConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.dims[-1]
        self.depth = len(config.depths)
        self.draws: Draws = RandomDraws()
        dims = config.dims
        stem = nn.Sequential(
            nn.Conv2d(config.in_channels, dims[0], 4, stride=4), ChannelNorm(dims[0], eps=NORM_EPS)
        )
        between = [
            nn.Sequential(ChannelNorm(below, eps=NORM_EPS), nn.Conv2d(below, above, 2, stride=2))
            for below, above in itertools.pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *between])
        rates = iter(torch.linspace(0, drop_path, sum(config.depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ConvNeXtBlock(dim, layerscale=config.layerscale, drop_path=next(rates))
                for _ in range(depth)
            )
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.reset_parameters()

    def set_draws(self, draws: Draws) -> None:
        """Takes all further random numbers from `draws`; see `VisionTransformer`."""
        self.draws = draws

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Starts every weight afresh.

        Args:
            generator: On the device of the weights; None takes the global one.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=WEIGHT_STD, generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvNeXtBlock) and module.gamma is not None:
                assert module.layerscale is not None
                nn.init.constant_(module.gamma, module.layerscale)

    def forward(self, images: Tensor, *, layers: Sequence[int] = (), norm: bool = True) -> Features:
        """Features of a batch.

        Args:
            images: `(B, C, H, W)`, normalised; H and W are multiples of 32.
            layers: Stages whose maps are wanted too, returned in order. Their width is that of the
                stage; their grid has strides 4, 8, 16 and 32, or `config.patch_size` for all.
            norm: Apply the final norm to the last stage; the earlier ones have none.

        Raises:
            ShapeError: C, H or W do not fit.
            UnknownNameError: there is no such stage.
        """
        wanted = pick_layers(layers, self.depth)
        maps = self._maps(images)
        size = images.shape[-2:]
        pairs = tuple(self._layer(maps[index], index, size, norm=norm) for index in wanted)
        tokens = self._tokens(maps[-1])
        if norm:
            tokens = self.norm(tokens)
        height, width = maps[-1].shape[-2:]
        return Features(
            cls=tokens[:, 0],
            registers=tokens[:, 1:1],
            patches=tokens[:, 1:],
            grid=(height, width),
            layers=pairs,
        )

    def forward_crops(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> list[Features]:
        """Features of several groups of crops, one group after the other.

        Args:
            crops: `(B_i, C, H_i, W_i)` per group.
            masks: None per group.

        Raises:
            ShapeError: a crop does not fit, or there is a mask.
        """
        self._refuse(masks)
        return [self(images) for images, _ in zip(crops, masks, strict=True)]

    def encode(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """As `forward_crops`, but tokens `(B_i, 1 + N_i, D)`, pooled first, before the norm."""
        self._refuse(masks)
        return [
            self._tokens(self._maps(images)[-1]) for images, _ in zip(crops, masks, strict=True)
        ]

    def _refuse(self, masks: Sequence[Tensor | None]) -> None:
        if any(mask is not None for mask in masks):
            raise ShapeError(
                "A ConvNeXt got a mask, but it cannot hide patches. Give None for each group, or "
                "train a ViT if masked patches are wanted."
            )

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The map `(B, C_s, H / stride_s, W / stride_s)` after each stage."""
        check_images(images, channels=self.config.in_channels, multiple=self.patch_size)
        maps: list[Tensor] = []
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x, self.draws)
            maps.append(x)
        return maps

    def _tokens(self, x: Tensor, pooled: Tensor | None = None) -> Tensor:
        """`(B, 1 + N, C)` of a map: its mean (or another pooled vector), then its cells."""
        pooled = x.mean((-2, -1)) if pooled is None else pooled
        return torch.cat([pooled[:, None], x.flatten(2).mT], dim=1)

    def _layer(
        self, x: Tensor, index: int, size: Sequence[int], *, norm: bool
    ) -> tuple[Tensor, Tensor]:
        """CLS and patches of a stage; the map is pooled before it is resized."""
        pooled = x.mean((-2, -1))
        if self.config.patch_size is not None:
            grid = [side // self.config.patch_size for side in size]
            x = F.interpolate(x, grid, mode="bilinear", antialias=True)
        tokens = self._tokens(x, pooled)
        if norm and index == self.depth - 1:
            tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1:]

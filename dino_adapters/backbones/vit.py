"""DINOv3's vision transformer (arXiv 2508.10104): registers, rotary positions, groups of crops.

With learned positions in their place it is that of DINO and DINOv2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dino_adapters.backbones.blocks import (
    WEIGHT_STD,
    Block,
    KeyMaskedLinear,
    LayerScale,
    RMSNorm,
    make_norm,
    pick_layers,
)
from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.draws import Draws, RandomDraws
from dino_adapters.backbones.patch import PatchEmbed
from dino_adapters.backbones.positions import resample_table
from dino_adapters.backbones.rope import RotaryEmbedding, Tables
from dino_adapters.contracts import Features, ShapeError

Grid = tuple[int, int]


class VisionTransformer(nn.Module):
    """A trainable ViT that returns `Features`; satisfies `contracts.Network`.

    Randomness. In train mode rotary positions are augmented anew in every block, and whole
    rows of the batch skip a branch (`drop_path`). All those numbers come from `self.draws`. Until
    `set_draws` is called that is the global generator of the device, which no run can repeat from
    the middle; training therefore hands in a source seeded by the step before each forward pass:

        network.set_draws(RandomDraws(chance.generator(seed, "network", step, rank)))

    In eval mode nothing is drawn.

    Args:
        config: The architecture.
        drop_path: Share of rows that each branch of each block leaves out, in train mode.

    Attributes:
        config: As given.
        embed_dim: D.
        patch_size: Pixels per side of a patch.
        num_registers: R.
        depth: Number of blocks.
        supports_masks: True.
        draws: Source of random numbers.
    """

    supports_masks = True

    def __init__(self, config: ViTConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.patch_size = config.patch_size
        self.num_registers = config.registers
        self.depth = config.depth
        self.draws: Draws = RandomDraws()
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        learned = config.positions == "learned"
        entries = 1 + config.position_grid**2
        self.pos_embed = nn.Parameter(torch.empty(1, entries, dim)) if learned else None
        self.rope_embed = None if learned else RotaryEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, drop_path=drop_path) for _ in range(config.depth))
        self.norm = make_norm(config)
        self.cls_norm = make_norm(config) if config.untie_cls_norm else None
        self.local_cls_norm = make_norm(config) if config.untie_local_cls_norm else None
        self.reset_parameters()

    def set_draws(self, draws: Draws) -> None:
        """Takes all further random numbers from `draws`; see the class."""
        self.draws = draws

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Starts every weight and buffer afresh, as DINOv3 does.

        Args:
            generator: On the device of the weights; None takes the global one.
        """
        nn.init.normal_(self.cls_token, std=WEIGHT_STD, generator=generator)
        if self.num_registers:
            nn.init.normal_(self.register_tokens, std=WEIGHT_STD, generator=generator)
        nn.init.zeros_(self.mask_token)
        self.patch_embed.reset_parameters(generator)
        if self.rope_embed is not None:
            self.rope_embed.reset_parameters()
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=WEIGHT_STD, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=WEIGHT_STD, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, KeyMaskedLinear):
                module.reset_mask()
            elif isinstance(module, (nn.LayerNorm, RMSNorm, LayerScale)):
                module.reset_parameters()

    def forward(self, images: Tensor, *, layers: Sequence[int] = (), norm: bool = True) -> Features:
        """Features of a batch.

        Args:
            images: `(B, C, H, W)`, normalised.
            layers: Blocks whose tokens are wanted too; negative numbers count from the end. They
                are returned in block order, each once.
            norm: Apply the final norm to every layer returned, the last included.

        Raises:
            ShapeError: C, H or W do not fit.
            UnknownNameError: there is no such layer.
        """
        wanted = pick_layers(layers, self.depth)
        (tokens,), (grid,), kept = self._run([images], [None], wanted)
        earlier = [self._features(layer, grid, norm=norm) for layer in kept]
        pairs = tuple((layer.cls, layer.patches) for layer in earlier)
        return self._features(tokens, grid, norm=norm, layers=pairs)

    def forward_crops(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> list[Features]:
        """Normed features of several groups of crops, which go through the blocks in step.

        Args:
            crops: `(B_i, C, H_i, W_i)` per group: global crops first, then local crops.
            masks: Per group bool `(B_i, N_i)`, True = replaced by the mask token, or None.

        Returns:
            One `Features` per group. With `untie_local_cls_norm`, CLS and registers of all groups
            but the first pass through `local_cls_norm` in train mode.

        Raises:
            ShapeError: a crop or mask does not fit.
        """
        groups, grids, _ = self._run(crops, masks, ())
        return [
            self._features(tokens, grid, local=index > 0)
            for index, (tokens, grid) in enumerate(zip(groups, grids, strict=True))
        ]

    def encode(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """As `forward_crops`, but the tokens `(B_i, 1 + R + N_i, D)` before the final norm."""
        return self._run(crops, masks, ())[0]

    def cls_attention(self, images: Tensor) -> Tensor:
        """How the class token of the last block spreads its attention over the patches.

        Args:
            images: `(B, C, H, W)`, normalised.

        Returns:
            `(B, heads, N)`, softmax over all tokens, of which only the patches are returned.

        Raises:
            ShapeError: C, H or W do not fit.
        """
        tokens, grid = self._embed(images, None)
        for block in self.blocks[:-1]:
            (tokens,) = block([tokens], [self._tables(grid)], self.draws)
        last = cast("Block", self.blocks[-1])
        weights = last.attn.cls_weights(last.norm1(tokens), self._tables(grid))
        return weights[..., 1 + self.num_registers :]

    def _run(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        wanted: Sequence[int],
    ) -> tuple[list[Tensor], list[Grid], list[Tensor]]:
        """Tokens of all groups after the last block, their grids, and the first group's layers."""
        embedded = [self._embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        groups = [tokens for tokens, _ in embedded]
        grids = [grid for _, grid in embedded]
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            # Within the loop, as each block of the official network draws its own augmentation.
            tables = [self._tables(grid) for grid in grids]
            groups = block(groups, tables, self.draws)
            if index in wanted:
                kept.append(groups[0])
        return groups, grids, kept

    def _tables(self, grid: Grid) -> Tables | None:
        """Rotations of one group in one block; None where positions are learned."""
        return None if self.rope_embed is None else self.rope_embed(grid, self.draws)

    def _embed(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Grid]:
        """Tokens `(B, 1 + R + N, D)` before the first block, and the grid."""
        patches, grid = self.patch_embed(images)
        cls = self.cls_token
        if mask is None:
            # Keeps the mask token in every graph, so that its gradient is zero and never missing.
            cls = cls + 0 * self.mask_token
        else:
            if mask.shape != patches.shape[:2]:
                raise ShapeError(
                    f"The mask has shape {tuple(mask.shape)}; the crops have "
                    f"{tuple(patches.shape[:2])} (crops, patches). Make one mask value per patch."
                )
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        if self.pos_embed is not None:
            table = resample_table(self.pos_embed, self.config.position_grid, grid)
            cls, patches = cls + table[:, :1], patches + table[:, 1:]
        count = len(patches)
        prefix = [cls.expand(count, -1, -1), self.register_tokens.expand(count, -1, -1)]
        return torch.cat([*prefix, patches], dim=1), grid

    def _features(
        self,
        tokens: Tensor,
        grid: Grid,
        *,
        norm: bool = True,
        local: bool = False,
        layers: tuple[tuple[Tensor, Tensor], ...] = (),
    ) -> Features:
        prefix, patches = tokens.split([1 + self.num_registers, grid[0] * grid[1]], dim=1)
        if norm:
            own = self.cls_norm if self.cls_norm is not None else self.norm
            if local and self.training and self.local_cls_norm is not None:
                own = self.local_cls_norm
            prefix, patches = own(prefix), self.norm(patches)
        return Features(
            cls=prefix[:, 0], registers=prefix[:, 1:], patches=patches, grid=grid, layers=layers
        )

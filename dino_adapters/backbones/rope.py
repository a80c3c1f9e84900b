"""Axial rotary positions for patch tokens (RoFormer, arXiv 2104.09864; DINOv3, arXiv 2508.10104).

Every function works in the dtype that its tensors have, and rounds after each operation. With
bfloat16 tables that order is visible in the features (about 1e-3), so do not reorder or fuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.draws import Draws

Tables = tuple[Tensor, Tensor]
"""`(sin, cos)`, each `(N, head_dim)`, N patches in row-major order."""

CACHED_GRIDS = 32
"""Tables kept at once; images of very many sizes must not fill the memory."""


def make_periods(
    head_dim: int,
    *,
    base: float | None = None,
    min_period: float | None = None,
    max_period: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Periods of the rotation, in units of half an image side.

    Args:
        head_dim: d, channels of one head; a multiple of 4.
        base: Geometric from 1 to just below `base`; or None.
        min_period: First period where `base` is None.
        max_period: Last period where `base` is None.
        dtype: In which everything is computed and rounded.

    Returns:
        `(d / 4,)`.
    """
    count = head_dim // 4
    if base is not None:
        exponents = 2 * torch.arange(count, dtype=dtype) / (head_dim // 2)
        return base**exponents
    assert min_period is not None
    assert max_period is not None
    return min_period * (max_period / min_period) ** torch.linspace(0, 1, count, dtype=dtype)


def make_coordinates(
    grid: tuple[int, int],
    *,
    relative_to: Literal["separate", "max", "min"] = "separate",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Centres of patches.

    Args:
        grid: `(h, w)` patches.
        relative_to: Divide rows by h and columns by w (`separate`), or both by the larger (`max`)
            or the smaller (`min`) of the two.
        dtype: In which everything is computed and rounded.
        device: Where.

    Returns:
        `(h * w, 2)`, (y, x) of each patch, row-major; -1 to 1 where an axis is divided by its size.
    """
    sides = {"separate": grid, "max": (max(grid),) * 2, "min": (min(grid),) * 2}[relative_to]
    axes = [
        (torch.arange(count, dtype=dtype, device=device) + 0.5) / side
        for count, side in zip(grid, sides, strict=True)
    ]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return 2.0 * centres - 1.0


def move_coordinates(
    coordinates: Tensor,
    draws: Draws,
    *,
    shift: float | None = None,
    jitter: float | None = None,
    rescale: float | None = None,
) -> Tensor:
    """Random shift, then jitter, then rescale: the order matters.

    Args:
        coordinates: `(N, 2)`.
        draws: Asked for 2, 2 and 1 numbers, in this order; nothing for what is None.
        shift: Largest shift of an axis, in half image sides.
        jitter: Largest factor of an axis (its inverse is the smallest); log-uniform.
        rescale: The same, with one factor for both axes.

    Returns:
        `(N, 2)`.
    """
    if shift is not None:
        coordinates = coordinates + draws.uniform(-shift, shift, (2,), like=coordinates)
    if jitter is not None:
        edge = math.log(jitter)
        coordinates = coordinates * draws.uniform(-edge, edge, (2,), like=coordinates).exp()
    if rescale is not None:
        edge = math.log(rescale)
        coordinates = coordinates * draws.uniform(-edge, edge, (1,), like=coordinates).exp()
    return coordinates


def make_tables(coordinates: Tensor, periods: Tensor) -> Tables:
    """Sines and cosines of all rotations.

    Args:
        coordinates: `(N, 2)`.
        periods: `(d / 4,)`, of the same dtype.

    Returns:
        `(sin, cos)`, each `(N, d)`: d/4 angles of y, d/4 of x, and the same again.
    """
    angles = 2 * math.pi * coordinates[:, :, None] / periods
    angles = angles.flatten(1, 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.sin(), angles.cos()


def rotate(tokens: Tensor, tables: Tables) -> Tensor:
    """Rotates patch tokens by their position; the tokens before them are only rounded.

    Args:
        tokens: Queries or keys `(..., P + N, d)`: P prefix tokens, then N patches.
        tables: For N patches. All tokens pass through their dtype, prefix included.

    Returns:
        Same shape and dtype as `tokens`.
    """
    sin, cos = tables
    rounded = tokens.to(sin.dtype)
    prefix, patches = rounded.split([rounded.shape[-2] - sin.shape[-2], sin.shape[-2]], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([prefix, turned], dim=-2).to(tokens.dtype)


def _forget_tables(module: nn.Module, _: object) -> None:
    """Runs after weights were loaded: the periods may be others now."""
    assert isinstance(module, RotaryEmbedding)
    module._kept.clear()


class RotaryEmbedding(nn.Module):
    """Tables for a grid: drawn anew at each call in training, kept otherwise.

    `periods` is a buffer of the state dict, because files hold it (often rounded to bfloat16) and
    the features depend on it. It never drops below the dtype of its config: a network moved to
    half precision keeps exact positions, and one moved to float64 gets float64 tables.
    """

    periods: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.embed_dim // config.num_heads
        self.augments = any(
            value is not None
            for value in (config.rope_shift, config.rope_jitter, config.rope_rescale)
        )
        self._kept: dict[tuple[object, ...], Tables] = {}
        dtype = torch.bfloat16 if config.rope_dtype == "bf16" else torch.float32
        self.register_buffer("periods", torch.empty(self.head_dim // 4, dtype=dtype))
        self.register_load_state_dict_post_hook(_forget_tables)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Computes `periods` from the config, in the dtype of the tables."""
        self._kept.clear()
        fresh = make_periods(
            self.head_dim,
            base=self.config.rope_base,
            min_period=self.config.rope_min_period,
            max_period=self.config.rope_max_period,
            dtype=self.table_dtype,
        )
        self.periods.copy_(fresh)

    @property
    def table_dtype(self) -> torch.dtype:
        """The config's dtype, but float64 in a float64 network with fp32 tables."""
        return torch.bfloat16 if self.config.rope_dtype == "bf16" else self.periods.dtype

    def forward(self, grid: tuple[int, int], draws: Draws) -> Tables:
        """Tables for a grid `(h, w)`; see `make_tables`."""
        if self.training and self.augments:
            return self._tables(grid, draws)
        key = (grid, self.periods.device, self.table_dtype)
        if key not in self._kept:
            if len(self._kept) >= CACHED_GRIDS:
                self._kept.pop(next(iter(self._kept)))
            # Kept tables outlive this call: inference tensors could not be used in training later.
            with torch.inference_mode(False):
                self._kept[key] = self._tables(grid, None)
        return self._kept[key]

    @torch.no_grad()
    def _tables(self, grid: tuple[int, int], draws: Draws | None) -> Tables:
        # Autocast would run some of these operations in fp32 and so change the rounding.
        with torch.autocast(self.periods.device.type, enabled=False):
            coordinates = make_coordinates(
                grid,
                relative_to=self.config.rope_coordinates,
                dtype=self.table_dtype,
                device=self.periods.device,
            )
            if draws is not None:
                coordinates = move_coordinates(
                    coordinates,
                    draws,
                    shift=self.config.rope_shift,
                    jitter=self.config.rope_jitter,
                    rescale=self.config.rope_rescale,
                )
            return make_tables(coordinates, self.periods.to(self.table_dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept.clear()
        before = self.periods
        super()._apply(fn, recurse)
        if torch.finfo(self.periods.dtype).eps > torch.finfo(before.dtype).eps:
            self.periods = before.to(self.periods.device)
        return self

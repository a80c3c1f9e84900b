"""Architectures as data: everything that rebuilds one of our networks, JSON-safe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_adapters.contracts import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """A vision transformer as DINOv3 has it (arXiv 2508.10104, section 3.2 and its model table).

    With learned positions it is that of DINO (arXiv 2104.14294) or DINOv2 (arXiv 2304.07193).
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    in_channels: int = 3
    registers: int = 4
    ffn: Literal["mlp", "swiglu"] = "mlp"
    ffn_ratio: float = 4.0
    """Hidden width over embed_dim; SwiGLU takes two thirds of it."""
    swiglu_align: int = 8
    """SwiGLU's hidden width is rounded up to a multiple of this."""
    qkv_bias: bool = True
    mask_k_bias: bool = True
    """The key's bias is multiplied by 0: it stays in the file and has no effect."""
    proj_bias: bool = True
    ffn_bias: bool = True
    layerscale: float | None = 1e-5
    """Start value of the per-channel gain on each branch; None leaves it out."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    untie_cls_norm: bool = False
    """A final norm of its own (`cls_norm`) for CLS and registers."""
    untie_local_cls_norm: bool = False
    """A final norm (`local_cls_norm`) for CLS and registers of local crops, in training only."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary ones in every block, or a learned table that is added once, before the blocks."""
    position_grid: int = 14
    """Patches per side of the learned table; other grids read it resampled. Unused with rope."""
    rope_base: float | None = 100.0
    rope_min_period: float | None = None
    rope_max_period: float | None = None
    """Either `rope_base`, or both periods."""
    rope_coordinates: Literal["separate", "max", "min"] = "separate"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = 2.0
    """Random coordinate changes of training; None turns one off."""
    rope_dtype: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be built."""
        if self.positions not in ("rope", "learned"):
            raise RecipeError(f"positions is '{self.positions}'. Give 'rope' or 'learned'.")
        if self.positions == "learned":
            self._check_learned()
            return
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 4:
            raise RecipeError(
                f"embed_dim {self.embed_dim} with {self.num_heads} heads gives heads of "
                f"{self.embed_dim / self.num_heads:g} channels. Rotary positions need a multiple "
                "of 4: change embed_dim or num_heads."
            )
        periods = (self.rope_min_period, self.rope_max_period)
        if (self.rope_base is None) == (None in periods):
            raise RecipeError(
                f"rope_base is {self.rope_base} and the periods are {periods}. Give either "
                "rope_base, or both rope_min_period and rope_max_period."
            )

    def _check_learned(self) -> None:
        if self.embed_dim % self.num_heads:
            raise RecipeError(
                f"embed_dim {self.embed_dim} does not divide into {self.num_heads} heads. Change "
                "embed_dim or num_heads."
            )
        if self.position_grid < 1:
            raise RecipeError(
                f"position_grid is {self.position_grid}. Give the patches per side of the learned "
                "table, e.g. 14 for 224 pixels in patches of 16."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvNeXtConfig:
    """A ConvNeXt with DINOv3's tokens: CLS is the pooled map (arXiv 2201.03545, 2508.10104)."""

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    in_channels: int = 3
    layerscale: float | None = 1e-6
    patch_size: int | None = None
    """Intermediate maps are resized to this stride; None leaves them at their own."""

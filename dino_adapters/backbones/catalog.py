"""Named architectures, and the released files that hold weights for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.contracts import IMAGENET_MEAN, IMAGENET_STD

_DINO: dict[str, Any] = {
    "depth": 12,
    "registers": 0,
    "mask_k_bias": False,
    "norm_eps": 1e-6,
    "positions": "learned",
}
_DINOV2 = {**_DINO, "patch_size": 14, "position_grid": 37}
"""Published for 518 pixels, which are 37 patches a side."""

CATALOG: dict[str, ViTConfig | ConvNeXtConfig] = {
    # Made for minutes: at DINOv3's gain of 1e-5 its blocks hardly act within some hundred steps.
    "vitmicro8": ViTConfig(embed_dim=96, depth=3, num_heads=3, patch_size=8, layerscale=1.0),
    "vittiny16": ViTConfig(embed_dim=192, depth=12, num_heads=3),
    "vits16": ViTConfig(embed_dim=384, depth=12, num_heads=6),
    "vits16plus": ViTConfig(embed_dim=384, depth=12, num_heads=6, ffn="swiglu", ffn_ratio=6.0),
    "vitb16": ViTConfig(embed_dim=768, depth=12, num_heads=12),
    "vitl16": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    "vith16plus": ViTConfig(embed_dim=1280, depth=32, num_heads=20, ffn="swiglu", ffn_ratio=6.0),
    "vit7b16": ViTConfig(
        embed_dim=4096,
        depth=40,
        num_heads=32,
        ffn="swiglu",
        ffn_ratio=3.0,
        swiglu_align=64,
        qkv_bias=False,
        untie_local_cls_norm=True,
    ),
    "vits16_dino": ViTConfig(embed_dim=384, num_heads=6, layerscale=None, **_DINO),
    "vits14_dinov2": ViTConfig(embed_dim=384, num_heads=6, **_DINOV2),
    "vitb14_dinov2": ViTConfig(embed_dim=768, num_heads=12, **_DINOV2),
    "cnx_tiny": ConvNeXtConfig(),
    "cnx_small": ConvNeXtConfig(depths=(3, 3, 27, 3)),
    "cnx_base": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "cnx_large": ConvNeXtConfig(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}
"""Ours (`vitmicro8`, `vittiny16`) are small enough for a CPU; names that end in `_dino` (arXiv
2104.14294) and `_dinov2` (arXiv 2304.07193) have learned positions; the others are DINOv3's sizes.
"""

DINOV3_LICENCE_NOTE = (
    "These weights come from Meta's DINOv3 release and stay under the DINOv3 License "
    "(19 August 2025), as does everything made from them: fine-tuned, converted or quantised "
    "copies may be passed on only under that licence and with a copy of it, publications must "
    "acknowledge it, and military, nuclear, espionage and weapons uses are excluded. "
    "This is a summary, not legal advice."
)


@dataclass(frozen=True, slots=True)
class Released:
    """One file of Meta's DINOv3 release.

    Attributes:
        architecture: Its name in `CATALOG`.
        trained_on: `lvd1689m` (web images) or `sat493m` (satellite images).
        untie_local_cls_norm: Whether the file holds a norm for local crops.
        mean: Per band, of the values 0..1 it was trained on.
        std: The same.
    """

    architecture: str
    trained_on: Literal["lvd1689m", "sat493m"] = "lvd1689m"
    untie_local_cls_norm: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


SAT_MEAN = (0.430, 0.411, 0.296)
SAT_STD = (0.213, 0.156, 0.143)
"""Statistics of SAT-493M, which the satellite networks expect instead of ImageNet's."""


def _satellite(architecture: str) -> Released:
    return Released(architecture, "sat493m", True, SAT_MEAN, SAT_STD)


RELEASED: dict[str, Released] = {
    "08c60483": Released("vits16"),
    "4057cbaa": Released("vits16plus"),
    "73cec8be": Released("vitb16"),
    "8aa4cbdd": Released("vitl16"),
    "eadcf0ff": _satellite("vitl16"),
    "7c1da9a5": Released("vith16plus"),
    "a955f4ea": Released("vit7b16", untie_local_cls_norm=True),
    "a6675841": _satellite("vit7b16"),
    "21b726bb": Released("cnx_tiny"),
    "296db49d": Released("cnx_small"),
    "801f2ba9": Released("cnx_base"),
    "61fa432d": Released("cnx_large"),
}
"""By the eight hex digits at the end of the file's name."""


def find_released(file: Path) -> Released | None:
    """What a file of the DINOv3 release is, by the digits at the end of its name."""
    return RELEASED.get(file.stem.rsplit("-", 1)[-1].lower())

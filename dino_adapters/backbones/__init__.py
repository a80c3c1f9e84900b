"""Networks and weights: built, loaded from any of four layouts, frozen, exported."""

from dino_adapters.backbones.card import digest_of
from dino_adapters.backbones.catalog import CATALOG
from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.backbones.convnext import ConvNeXt
from dino_adapters.backbones.foreign import TimmNetwork
from dino_adapters.backbones.frozen import FrozenBackbone
from dino_adapters.backbones.load import build_network, load_backbone
from dino_adapters.backbones.lora import add_lora, has_lora, merged, share_frozen
from dino_adapters.backbones.save import export_backbone
from dino_adapters.backbones.vit import VisionTransformer

__all__ = [
    "CATALOG",
    "ConvNeXt",
    "ConvNeXtConfig",
    "FrozenBackbone",
    "TimmNetwork",
    "ViTConfig",
    "VisionTransformer",
    "add_lora",
    "build_network",
    "digest_of",
    "export_backbone",
    "has_lora",
    "load_backbone",
    "merged",
    "share_frozen",
]

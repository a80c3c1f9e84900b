"""DINOv3-style pretraining on your own images, a frozen backbone, and honest few-label evidence."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_adapters.backbones import export_backbone, load_backbone
    from dino_adapters.contracts import Band, DinoAdaptersError, Features, Sample
    from dino_adapters.features import FeatureStore, embed
    from dino_adapters.heads import LinearProbe, NearestMean, WeightedKNN
    from dino_adapters.pretrain import pretrain

__version__ = "0.1.0"

# Name -> room. Rooms are imported when a name is first used, so that this import stays light.
_HOME = {
    "Band": "contracts",
    "DinoAdaptersError": "contracts",
    "FeatureStore": "features",
    "Features": "contracts",
    "LinearProbe": "heads",
    "NearestMean": "heads",
    "Sample": "contracts",
    "WeightedKNN": "heads",
    "embed": "features",
    "export_backbone": "backbones",
    "load_backbone": "backbones",
    "pretrain": "pretrain",
}
__all__ = [
    "Band",
    "DinoAdaptersError",
    "FeatureStore",
    "Features",
    "LinearProbe",
    "NearestMean",
    "Sample",
    "WeightedKNN",
    "embed",
    "export_backbone",
    "load_backbone",
    "pretrain",
]


def __getattr__(name: str) -> object:
    """The public names, each from its room (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'dino_adapters' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """What `dir(dino_adapters)` and completion show."""
    return [*__all__, "__version__"]

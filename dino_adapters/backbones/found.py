"""A source that was found: what it names, before it is built, and what was asked for with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dino_adapters.backbones.card import CARD, WEIGHTS, read_card
from dino_adapters.backbones.catalog import Released
from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.backbones.convert import Family, Library, family_of, recognise, to_ours
from dino_adapters.backbones.foreign import TimmNetwork
from dino_adapters.backbones.weights import DINOV3_LICENCE_ID, read_tensors, released_as
from dino_adapters.contracts import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RGB,
    Band,
    RecipeError,
    WeightsError,
)

Config = ViTConfig | ConvNeXtConfig
Architecture = Config | Mapping[str, Any] | None


@dataclass(kw_only=True)
class Found:
    """A network that is named but, if it is one of ours, not yet built.

    Attributes:
        name: For the card.
        config: Of one of our networks; None if `foreign` is set.
        state: Its tensors by our names; None for random ones.
        layout: Whose names the tensors had.
        foreign: A network of timm, built, with its weights.
        licence: Of the weights.
        bands: Bands it reads; None for a random network that reads whatever is asked for.
        mean: Per band.
        std: Per band.
        size: Side in pixels of its training images.
        training: How the weights came to be, as far as known.
        untrained_bands: As in `BackboneInfo`.
    """

    name: str
    config: Config | None = None
    state: dict[str, Tensor] | None = None
    layout: tuple[Library, Family] | None = None
    foreign: TimmNetwork | None = None
    licence: str = "none"
    bands: tuple[Band, ...] | None = RGB
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: int = 224
    training: Mapping[str, Any] = field(default_factory=dict)
    untrained_bands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """The part of a call that decides what is found.

    Attributes:
        architecture: Fields to change, or a whole config; for other networks of timm, keywords of
            `timm.create_model`.
        checkpoint: Weights for an architecture that is named.
        seed: Of random weights.
        bands: Bands asked for; None: the network's own.
    """

    architecture: Architecture = None
    checkpoint: Path | None = None
    seed: int = 0
    bands: tuple[Band, ...] | None = None

    def without_checkpoint(self, source: str) -> None:
        """Refuses a checkpoint beside a source that has weights of its own.

        Raises:
            RecipeError: there is one.
        """
        if self.checkpoint is not None:
            raise RecipeError(
                f"checkpoint is {self.checkpoint}, and {source} brings weights of its own. Give "
                "one of the two; a checkpoint goes with the name of an architecture."
            )


def take_facts(found: Found, released: Released) -> None:
    """Notes what is known of a file of Meta's release."""
    found.licence, found.mean, found.std = DINOV3_LICENCE_ID, released.mean, released.std
    found.training = {**found.training, "trained_on": released.trained_on}


def take_checkpoint(found: Found, path: Path) -> None:
    """Puts a file's tensors, in any layout, into one of our networks.

    Raises:
        WeightsError: the file is of another family or cannot be read.
    """
    assert found.config is not None
    tensors = read_tensors(path)
    layout, family = recognise(tensors), family_of(found.config)
    if layout is None or layout[1] != family:
        held = f"a {layout[1]}" if layout else f"no DINOv3 ({', '.join([*tensors][:3])}, …)"
        raise WeightsError(
            f"{path.name} holds {held}, and '{found.name}' is a {family}. Name the checkpoint that "
            "belongs to it."
        )
    found.layout, found.state = layout, to_ours(tensors, layout)
    if isinstance(found.config, ViTConfig):
        # Of one architecture, some files hold a norm for local crops and some do not.
        held = "local_cls_norm.weight" in found.state
        found.config = dataclasses.replace(found.config, untie_local_cls_norm=held)
    found.training, found.licence, found.bands = {"weights": path.name}, "unknown", RGB
    released = released_as(path)
    if released is not None:
        take_facts(found, released)
    elif path.name == WEIGHTS and (path.parent / CARD).is_file():
        card = read_card(path.parent)
        found.licence, found.bands = card.licence, card.bands
        found.mean, found.std, found.size = card.mean, card.std, card.size
        found.training, found.untrained_bands = card.training, card.untrained_bands

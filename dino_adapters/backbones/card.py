"""`card.json`: what a backbone is, beside its weights; and the digest that names it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_adapters.backbones.catalog import DINOV3_LICENCE_NOTE
from dino_adapters.backbones.weights import DINOV3_LICENCE_ID, read_json
from dino_adapters.contracts import BackboneInfo, Band, WeightsError

CARD = "card.json"
WEIGHTS = "model.safetensors"
FORMAT = "dino-adapters-backbone"
FORMAT_VERSION = 1


def digest_of(network: nn.Module, info: BackboneInfo) -> str:
    """Hex BLAKE2b-128 of weights, architecture, bands and normalisation.

    Two backbones of one digest give the same vectors; names, licence and history do not count.
    """
    hashed = hashlib.blake2b(digest_size=16)
    said = {
        "family": info.family,
        "architecture": plain(info.architecture),
        "bands": plain([dataclasses.asdict(band) for band in info.bands]),
        "mean": list(info.mean),
        "std": list(info.std),
    }
    hashed.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        whole = tensor.detach().cpu().contiguous()
        hashed.update(f"\n{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        hashed.update(whole.reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def card_of(info: BackboneInfo, formats: Mapping[str, Any]) -> dict[str, Any]:
    """The card as a JSON-safe dict.

    Args:
        info: Of the backbone.
        formats: What was written for timm and transformers, or why it was not.
    """
    from dino_adapters import __version__

    card: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "info": plain(dataclasses.asdict(info)),
        "formats": dict(formats),
    }
    if info.licence == DINOV3_LICENCE_ID:
        card["licence_note"] = DINOV3_LICENCE_NOTE
    return card


def read_card(folder: Path) -> BackboneInfo:
    """The info of an exported backbone.

    Raises:
        WeightsError: the card is absent, damaged, or of a newer version.
    """
    card = read_json(folder / CARD)
    if card.get("format") != FORMAT or not isinstance(card.get("info"), dict):
        raise WeightsError(
            f"{folder / CARD} is no card of a backbone. Name a folder that export wrote."
        )
    if card.get("format_version", 0) > FORMAT_VERSION:
        raise WeightsError(
            f"{folder / CARD} has version {card['format_version']}, and this package reads up to "
            f"{FORMAT_VERSION}. Update dino-adapters."
        )
    given: dict[str, Any] = dict(card["info"])
    try:
        given["bands"] = tuple(Band(**band) for band in given["bands"])
        for key in ("mean", "std", "untrained_bands"):
            given[key] = tuple(given[key])
        return BackboneInfo(**given)
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / CARD} lacks or misnames a field ({error}). Export the backbone again."
        ) from error


def plain(value: Any) -> Any:
    """A JSON-safe copy: tuples become lists, so that what is read equals what was written."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def exports_below(folder: Path) -> list[Path]:
    """Export folders right inside this one, as a distillation of several students leaves them."""
    return sorted(card.parent for card in folder.glob(f"*/{CARD}"))

"""Networks from anything that names one: found, checked, converted, given the bands asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_adapters.backbones.bands import (
    UNTRAINED,
    Spread,
    band_statistics,
    check_bands,
    spread_filters,
    untrained_names,
)
from dino_adapters.backbones.card import digest_of, plain
from dino_adapters.backbones.catalog import DINOV3_LICENCE_NOTE
from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.convert import family_of, fill_untold, fit, settle_biases
from dino_adapters.backbones.convnext import ConvNeXt
from dino_adapters.backbones.find import find
from dino_adapters.backbones.foreign import first_convolution
from dino_adapters.backbones.found import Architecture, Found, Request
from dino_adapters.backbones.frozen import FrozenBackbone
from dino_adapters.backbones.vit import VisionTransformer
from dino_adapters.backbones.weights import DINOV3_LICENCE_ID
from dino_adapters.contracts import RGB, BackboneInfo, Band, RecipeError
from dino_adapters.runtime import chance
from dino_adapters.runtime.console import Notices

Source = str | os.PathLike[str] | nn.Module

RANDOM = (
    "The weights are random: nothing was trained or downloaded. Give an exported folder, a weights "
    "file, or hub: and a name of timm"
)
STEMS = {"vit": "patch_embed.proj.weight", "convnext": "downsample_layers.0.0.weight"}


def build_network(
    source: Source,
    *,
    bands: Sequence[Band] | None = None,
    spread: Spread = "by_name",
    architecture: Architecture = None,
    checkpoint: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    drop_path: float = 0.0,
    seed: int = 0,
    notices: Notices | None = None,
) -> tuple[Any, BackboneInfo]:
    """A trainable network (an `nn.Module` that satisfies `contracts.Network`), fp32 on the CPU.

    Nothing is downloaded, unless the source starts with `hub:`; nothing in a file is run.

    Args:
        source: One of
            a name of our catalogue (`vits16`, random weights);
            a folder that `export_backbone` wrote, or its `model.safetensors`;
            an official DINOv3 file, or a trainer's export `{"teacher": {"backbone.*"}}`;
            a folder of transformers (DINOv3 only) or of timm (`local-dir`);
            a name of timm (random weights, or those of `checkpoint`), `timm/` before it or not;
            `hub:` and a name of timm, which fetches its weights;
            `demo:efficientnet_lite0`, trained weights from the `demo` extra;
            a module of timm or transformers, or one of ours, whose weights are copied.
        bands: What the network shall read; None keeps its own (RGB for new ones).
        spread: How filters go to bands that the weights do not know; see `bands.spread_filters`.
        architecture: Changes to the architecture found, or a whole config in its place; for
            networks of timm that are no DINOv3, keywords of `timm.create_model`.
        checkpoint: A weight file for a source that names an architecture.
        mean: Per band, of values mapped to 0..1; see `bands.band_statistics` for the default.
        std: The same.
        drop_path: Share of branches left out in training.
        seed: Random weights follow from it alone.
        notices: Told of everything converted or assumed.

    Returns:
        The network in eval mode, and what to know about it.

    Raises:
        UnknownNameError: no such network; the message holds the nearest name.
        WeightsError: weights that are damaged, incomplete, run code, or do not fit.
        RecipeError: arguments that do not go together.
        UnitsError: mean or std do not fit the bands.
        MissingLibraryError: the source needs an extra that is absent.
    """
    notices = Notices() if notices is None else notices
    wanted = None if bands is None else check_bands(bands)
    request = Request(
        architecture=architecture,
        checkpoint=None if checkpoint is None else Path(checkpoint).expanduser(),
        seed=seed,
        bands=wanted,
    )
    found = find(source, request)
    have, want = _have_and_want(found, wanted)
    # A random network has bands of no one; what RGB is known for still holds by name.
    known = RGB if found.bands is None else have
    statistics = band_statistics(
        known,
        want,
        (found.mean, found.std),
        (mean, std),
        notices,
        trained=found.bands is not None,
    )
    names = tuple(band.name for band in have), tuple(band.name for band in want)
    spread_now = untrained_names(*names, spread)
    before = found.untrained_bands
    untrained = tuple(name for name in names[1] if name in before or name in spread_now)
    if found.foreign is not None:
        network = _spread_foreign(found.foreign, names, spread)
        if drop_path:
            notices.add("drop_path is not set for networks of timm", found.name)
    else:
        network = _build_ours(found, names, spread, drop_path, seed, notices)
    info = _describe(found, network, want, statistics, untrained)
    if info.licence == DINOV3_LICENCE_ID:
        notices.add(DINOV3_LICENCE_NOTE, found.name)
    return network.eval(), dataclasses.replace(info, digest=digest_of(network, info))


def load_backbone(
    source: Source,
    *,
    bands: Sequence[Band] | None = None,
    spread: Spread = "by_name",
    architecture: Architecture = None,
    checkpoint: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    notices: Notices | None = None,
    device: torch.device | str = "cpu",
) -> FrozenBackbone:
    """A frozen backbone from anything that names one.

    Filters that were spread over new bands and never trained are reported, with what that costs.

    Args:
        source: See `build_network`.
        bands: The same.
        spread: The same.
        architecture: The same.
        checkpoint: The same.
        mean: The same.
        std: The same.
        seed: The same.
        notices: The same.
        device: Where it shall run.

    Raises:
        UnknownNameError: as in `build_network`, with all its other errors.
    """
    notices = Notices() if notices is None else notices
    network, info = build_network(
        source,
        bands=bands,
        spread=spread,
        architecture=architecture,
        checkpoint=checkpoint,
        mean=mean,
        std=std,
        seed=seed,
        notices=notices,
    )
    if info.training.get("weights") == "random":
        notices.add(RANDOM, info.name)
    if info.untrained_bands:
        notices.add(UNTRAINED, ", ".join(info.untrained_bands))
    return FrozenBackbone(network, info).to(device)


def _have_and_want(
    found: Found, wanted: tuple[Band, ...] | None
) -> tuple[tuple[Band, ...], tuple[Band, ...]]:
    """The bands that the weights are for, and those that the network shall read.

    Raises:
        RecipeError: the weights have filters for bands that nobody named.
    """
    have = found.bands if found.bands is not None else (wanted or RGB)
    if found.state is not None and found.config is not None:
        stem = found.state.get(STEMS[family_of(found.config)])
        channels = len(have) if stem is None else stem.shape[1]
        if channels != len(have):
            if wanted is None or len(wanted) != channels:
                raise RecipeError(
                    f"The weights of '{found.name}' read {channels} channels, and nothing says "
                    f"which. Give bands= with {channels} bands."
                )
            found.bands, have = None, wanted
    return have, have if wanted is None else wanted


def _build_ours(
    found: Found,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    spread: Spread,
    drop_path: float,
    seed: int,
    notices: Notices,
) -> VisionTransformer | ConvNeXt:
    assert found.config is not None
    config = dataclasses.replace(found.config, in_channels=len(names[1]))
    # On the meta device the constructor draws nothing from the global generator.
    with torch.device("meta"):
        if isinstance(config, ViTConfig):
            network = VisionTransformer(config, drop_path=drop_path)
        else:
            network = ConvNeXt(config, drop_path=drop_path)
    network.to_empty(device="cpu")
    network.reset_parameters(chance.generator(seed, "weights"))
    if found.state is None:
        return network
    assert found.layout is not None
    state = dict(found.state)
    if isinstance(config, ViTConfig):
        state = settle_biases(state, config, notices)
    if found.layout[0] == "timm":
        notices.add("timm keeps no mask token: it starts at zero", found.name)
    stem = STEMS[family_of(config)]
    if stem in state and names[0] != names[1]:
        state[stem] = spread_filters(state[stem].float(), *names, spread)
    fit(network, fill_untold(state, network, found.layout), f"'{found.name}'")
    return network


def _spread_foreign(
    network: Any, names: tuple[tuple[str, ...], tuple[str, ...]], spread: Spread
) -> Any:
    """Gives the first convolution of a timm network its new filters, in place."""
    if names[0] != names[1]:
        first = first_convolution(network)
        first.weight = nn.Parameter(spread_filters(first.weight.detach(), *names, spread))
        first.in_channels = len(names[1])
        network.arguments["in_chans"] = len(names[1])
    return network


def _describe(
    found: Found,
    network: Any,
    bands: tuple[Band, ...],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    untrained: tuple[str, ...],
) -> BackboneInfo:
    if found.foreign is None:
        family, architecture = family_of(network.config), dataclasses.asdict(network.config)
    else:
        family = "timm"
        architecture = {"timm": network.name, "arguments": network.arguments}
    return BackboneInfo(
        name=found.name,
        family=family,
        embed_dim=network.embed_dim,
        patch_size=network.patch_size,
        depth=network.depth,
        registers=network.num_registers,
        bands=bands,
        mean=statistics[0],
        std=statistics[1],
        size=found.size,
        architecture=plain(architecture),
        licence=found.licence,
        training=plain(found.training),
        untrained_bands=untrained,
    )

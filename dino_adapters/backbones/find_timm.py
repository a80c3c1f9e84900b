"""Networks of timm: by name, by folder, or as a module; DINOv3's become ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.backbones.catalog import CATALOG
from dino_adapters.backbones.convert import Family, Library, family_of, fit, to_ours
from dino_adapters.backbones.convert_config import config_of_timm, timm_state
from dino_adapters.backbones.foreign import TimmNetwork, check_timm_name, create_timm
from dino_adapters.backbones.found import Found, Request, take_checkpoint
from dino_adapters.backbones.infer import adjust
from dino_adapters.backbones.weights import read_folder, read_json, read_tensors
from dino_adapters.contracts import RGB, RecipeError, WeightsError


def find_timm(name: str, request: Request) -> Found:
    """A network by timm's name, with random weights or those of `request.checkpoint`.

    Raises:
        UnknownNameError: neither timm nor our catalogue knows the name.
        WeightsError: the checkpoint does not fit.
    """
    check_timm_name(name, CATALOG)
    with torch.device("meta"):
        sketch = create_timm(name).model
    config = config_of_timm(sketch)
    # A tag says whose weights are meant; a bare name with a file says nothing.
    licence = str(sketch.pretrained_cfg.get("license") or "unknown") if "." in name else "unknown"
    training: dict[str, Any] = {"weights": "random", "seed": request.seed}
    if config is not None:
        config = adjust(config, request.architecture)
        found = Found(name=name, config=config, bands=None, training=training)
        if request.checkpoint is not None:
            take_checkpoint(found, request.checkpoint)
            found.licence = licence if found.licence == "unknown" else found.licence
        return found
    arguments = _arguments(name, request)
    if request.checkpoint is None:
        if request.bands is not None:
            arguments["in_chans"] = len(request.bands)
        network = create_timm(name, arguments=arguments, seed=request.seed)
        return _foreign(network, request, training=training, licence="none", random=True)
    network = create_timm(name, arguments=arguments, seed=request.seed)
    fit_timm(network, read_tensors(request.checkpoint), request.checkpoint.name)
    training = {"weights": request.checkpoint.name}
    return _foreign(network, request, training=training, licence=licence)


def find_hub(name: str, request: Request) -> Found:
    """A network of timm with the weights that its hub holds.

    Raises:
        UnknownNameError: timm does not know the name.
        WeightsError: the weights cannot be fetched.
    """
    name = name.removeprefix("timm/")
    check_timm_name(name)
    with torch.device("meta"):
        config = config_of_timm(create_timm(name).model)
    arguments = _arguments(name, request) if config is None else {}
    network = create_timm(name, arguments=arguments, pretrained=True)
    licence = str(network.model.pretrained_cfg.get("license") or "unknown")
    training = {"weights": f"hub:{name}"}
    if config is None:
        return _foreign(network, request, training=training, licence=licence)
    found = find_timm_module(network.model, request)
    found.name, found.training = name, training
    return found


def find_timm_folder(folder: Path, request: Request) -> Found:
    """A folder in timm's own layout: `config.json` with an architecture, and weights.

    Raises:
        WeightsError: the configuration or the weights do not fit.
    """
    facts = read_json(folder / "config.json")
    name, arguments = str(facts["architecture"]), dict(facts.get("model_args") or {})
    cfg = dict(facts.get("pretrained_cfg") or {})
    try:
        with torch.device("meta"):
            sketch = create_timm(name, arguments=arguments)
    except TypeError as error:
        raise WeightsError(
            f"{folder / 'config.json'} holds model_args that timm's {name} does not take "
            f"({error}). Update timm, or export the network again."
        ) from error
    sketch.model.pretrained_cfg = {**cfg, "architecture": name}
    config = config_of_timm(sketch.model)
    licence = str(cfg.get("license") or "unknown")
    training = {"weights": folder.name}
    if config is None:
        network = create_timm(name, arguments={**arguments, **_arguments(name, request)})
        fit_timm(network, read_folder(folder), folder.name)
        found = _foreign(network, request, training=training, licence=licence)
    else:
        layout: tuple[Library, Family] = ("timm", family_of(config))
        found = Found(name=name, config=adjust(config, request.architecture), layout=layout)
        found.state = to_ours(read_folder(folder), layout)
        found.licence, found.training = licence, training
    for field in ("mean", "std"):
        if found.bands and len(cfg.get(field) or ()) == len(found.bands):
            setattr(found, field, tuple(float(number) for number in cfg[field]))
    return found


def find_timm_module(module: nn.Module, request: Request) -> Found:
    """A module of timm with its weights, which are copied.

    Raises:
        WeightsError: it offers no feature maps.
    """
    facts: dict[str, Any] = dict(getattr(module, "pretrained_cfg", None) or {})
    licence = str(facts.get("license") or "unknown")
    name = str(facts.get("architecture") or type(module).__name__)
    training = {"weights": "as in the module given"}
    config = config_of_timm(module)
    if config is None:
        arguments = _recorded_arguments(module)
        network = TimmNetwork(copy.deepcopy(module), name=name, arguments=arguments)
        return _foreign(network, request, training=training, licence=licence)
    layout: tuple[Library, Family] = ("timm", family_of(config))
    state = {key: t.detach().clone() for key, t in to_ours(timm_state(module), layout).items()}
    found = Found(name=name, config=adjust(config, request.architecture), layout=layout)
    found.state, found.licence, found.training = state, licence, training
    return found


def fit_timm(network: TimmNetwork, tensors: Mapping[str, Tensor], whose: str) -> None:
    """Loads a timm network's tensors by timm's names, a classifier's left out.

    Raises:
        WeightsError: names missing, unexpected and mis-shaped tensors.
    """
    named = network.model.default_cfg.get("classifier") or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    own = network.model.state_dict()
    dropped = [k for k in tensors if k not in own and k.rpartition(".")[0] in heads]
    fit(network.model, {k: t for k, t in tensors.items() if k not in dropped}, whose)


def _foreign(
    network: TimmNetwork,
    request: Request,
    *,
    training: Mapping[str, Any],
    licence: str,
    random: bool = False,
) -> Found:
    facts = network.model.default_cfg
    found = Found(name=network.name, foreign=network, licence=licence, training=training)
    if facts.get("input_size"):
        found.size = int(facts["input_size"][-1])
    channels = network.input_channels
    if channels == len(RGB):
        found.mean, found.std = tuple(facts["mean"]), tuple(facts["std"])
        found.bands = None if random and request.bands is not None else RGB
    elif request.bands is not None and len(request.bands) == channels:
        found.bands = None if random else request.bands
    else:
        raise RecipeError(
            f"{network.name} reads {channels} channels, and nothing says which. Give bands= with "
            f"{channels} bands."
        )
    return found


def _arguments(name: str, request: Request) -> dict[str, Any]:
    given = request.architecture
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"architecture is a {type(given).__name__}, and '{name}' is no DINOv3 network. Give a "
            "mapping with keywords of timm.create_model, or leave it out."
        )
    return dict(given)


def _recorded_arguments(module: nn.Module) -> dict[str, Any]:
    """What the module was made with, where timm notes it (since 1.0.30) and JSON can say it."""
    noted = {**getattr(module, "_model_args", {}), "num_classes": 0}
    if getattr(module, "num_classes", 0):
        noted.pop("num_classes")
    try:
        return json.loads(json.dumps(noted))
    except TypeError:
        return {}

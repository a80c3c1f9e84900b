"""What a source names: one of our names, files and folders of four kinds, timm's names, modules."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dino_adapters.backbones.card import CARD, WEIGHTS, exports_below, read_card
from dino_adapters.backbones.catalog import CATALOG, SAT_MEAN, SAT_STD
from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.backbones.convert import Family, Library, family_of, recognise, to_ours
from dino_adapters.backbones.convert_config import (
    config_of_transformers,
    facts_of_transformers,
    is_transformers,
)
from dino_adapters.backbones.convnext import ConvNeXt
from dino_adapters.backbones.demo import LICENCE, MEAN, PREFIX, STD, demo_network
from dino_adapters.backbones.find_timm import (
    find_hub,
    find_timm,
    find_timm_folder,
    find_timm_module,
    fit_timm,
)
from dino_adapters.backbones.foreign import TimmNetwork, create_timm
from dino_adapters.backbones.found import Found, Request, take_checkpoint, take_facts
from dino_adapters.backbones.infer import adjust, config_from, infer_convnext, infer_vit
from dino_adapters.backbones.vit import VisionTransformer
from dino_adapters.backbones.weights import (
    SUFFIXES,
    licence_of_name,
    read_folder,
    read_json,
    read_tensors,
    released_as,
)
from dino_adapters.contracts import RGB, RecipeError, WeightsError

HUB = "hub:"
PREPROCESSOR = "preprocessor_config.json"


def find(source: str | os.PathLike[str] | nn.Module, request: Request) -> Found:
    """What `source` names; see `load.build_network`.

    Raises:
        UnknownNameError: no such network; the message holds the nearest name.
        WeightsError: the weights cannot be read, or belong to something else.
        RecipeError: the architecture or the checkpoint does not go with the source.
    """
    if isinstance(source, nn.Module):
        request.without_checkpoint("a module")
        return _module(source, request)
    text = os.fspath(source)
    if text in CATALOG:
        return _named(text, request)
    if text.startswith(PREFIX):
        request.without_checkpoint(text)
        return _demo(text)
    if text.startswith(HUB):
        request.without_checkpoint(text)
        return find_hub(text.removeprefix(HUB), request)
    path = Path(text).expanduser()
    if path.exists():
        request.without_checkpoint(text)
        return _folder(path, request) if path.is_dir() else _file(path, request)
    looks_like_path = "/" in text.removeprefix("timm/") or text[:1] in (".", "~")
    if isinstance(source, os.PathLike) or path.suffix in SUFFIXES or looks_like_path:
        raise WeightsError(f"There is no file or folder {text}. Check the path.")
    return find_timm(text.removeprefix("timm/"), request)


def _named(name: str, request: Request) -> Found:
    training = {"weights": "random", "seed": request.seed}
    config = adjust(CATALOG[name], request.architecture)
    found = Found(name=name, config=config, bands=None, training=training)
    if request.checkpoint is not None:
        take_checkpoint(found, request.checkpoint)
    return found


def _demo(text: str) -> Found:
    found = Found(name=text, foreign=demo_network(text), licence=LICENCE, mean=MEAN, std=STD)
    found.training = {"weights": "trained with the labels of ImageNet-1k"}
    return found


def _module(module: nn.Module, request: Request) -> Found:
    if isinstance(module, VisionTransformer | ConvNeXt):
        config = adjust(module.config, request.architecture)
        found = Found(name="module", config=config, layout=("official", family_of(config)))
        found.state = {key: t.detach().clone() for key, t in module.state_dict().items()}
        found.licence, found.training = "unknown", {"weights": "as in the module given"}
        return found
    if isinstance(module, TimmNetwork):
        found = find_timm_module(module.model, request)
        found.name = module.name
        if found.foreign is not None:
            found.foreign = copy.deepcopy(module)
        return found
    if is_transformers(module):
        facts = facts_of_transformers(module)
        origin = str(getattr(module, "name_or_path", ""))
        return _transformers(facts, module.state_dict(), origin, request)
    return find_timm_module(module, request)


def _folder(folder: Path, request: Request) -> Found:
    if (folder / CARD).is_file():
        return _exported(folder, request)
    if not (folder / "config.json").is_file():
        inside = exports_below(folder)
        hint = "Name a folder that export wrote, or one of timm or transformers."
        if inside:
            hint = f"Did you mean {' or '.join(map(str, inside))}?"
        raise WeightsError(f"{folder} holds neither {CARD} nor config.json. {hint}")
    facts = read_json(folder / "config.json")
    if "model_type" in facts:
        found = _transformers(facts, read_folder(folder), str(folder.resolve()), request)
        if (folder / PREPROCESSOR).is_file():
            said = read_json(folder / PREPROCESSOR)
            if len(said.get("image_mean") or ()) == len(said.get("image_std") or ()) == len(RGB):
                found.mean, found.std = tuple(said["image_mean"]), tuple(said["image_std"])
        return found
    if "architecture" in facts:
        return find_timm_folder(folder, request)
    raise WeightsError(
        f"{folder / 'config.json'} names no model_type and no architecture. Name a folder of timm "
        "or transformers."
    )


def _file(path: Path, request: Request) -> Found:
    if path.name == WEIGHTS and (path.parent / CARD).is_file():
        return _exported(path.parent, request)
    tensors = read_tensors(path)
    layout = recognise(tensors)
    if layout is None:
        raise WeightsError(
            f"{path.name} holds no DINOv3 network ({', '.join([*tensors][:3])}, …). For a network "
            "of timm give its name as the source and this file as checkpoint=."
        )
    state = to_ours(tensors, layout)
    found = Found(name=path.stem, config=_config(state, layout[1], request), layout=layout)
    found.state, found.licence, found.training = state, "unknown", {"weights": path.name}
    released = released_as(path)
    if released is not None:
        found.name = released.architecture
        take_facts(found, released)
    return found


def _config(
    state: Mapping[str, Tensor], family: Family, request: Request
) -> ViTConfig | ConvNeXtConfig:
    """What is asked for, where that is a whole config; else what the tensors say, with changes."""
    given = request.architecture
    kind = ViTConfig if family == "vit" else ConvNeXtConfig
    if given is not None and not isinstance(given, Mapping):
        if not isinstance(given, kind):
            raise RecipeError(
                f"architecture is a {type(given).__name__}, and the file holds a {family}. Give a "
                f"{kind.__name__}, or leave it out."
            )
        return given
    return infer_vit(state, given) if family == "vit" else infer_convnext(state, given)


def _transformers(
    facts: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: str, request: Request
) -> Found:
    layout = recognise(tensors)
    if layout is None or layout[0] != "transformers":
        raise WeightsError(
            f"The tensors ({', '.join([*tensors][:3])}, …) are not those of transformers' DINOv3 "
            "networks, which the configuration promises. Fetch or save the folder again."
        )
    state = {key: t.detach().clone() for key, t in to_ours(tensors, layout).items()}
    config = adjust(config_of_transformers(facts, state), request.architecture)
    found = Found(name=str(facts["model_type"]), config=config, state=state, layout=layout)
    found.licence = str(facts.get("license") or licence_of_name(origin))
    found.training = {"weights": Path(origin).name or "as in the module given"}
    if "sat493m" in origin:
        found.mean, found.std = SAT_MEAN, SAT_STD
    return found


def _exported(folder: Path, request: Request) -> Found:
    info = read_card(folder)
    tensors = read_tensors(folder / WEIGHTS)
    found = Found(name=info.name, licence=info.licence, bands=info.bands, training=info.training)
    found.mean, found.std, found.size = info.mean, info.std, info.size
    found.untrained_bands = info.untrained_bands
    if info.family == "timm":
        said = dict(info.architecture)
        if not {"timm", "arguments"} <= set(said):
            raise WeightsError(f"{folder / CARD} names no network of timm. Export it again.")
        found.foreign = create_timm(str(said["timm"]), arguments=said["arguments"])
        fit_timm(found.foreign, _without("model.", tensors), folder.name)
        return found
    kind = ViTConfig if info.family == "vit" else ConvNeXtConfig
    found.config = adjust(config_from(kind, info.architecture), request.architecture)
    layout: tuple[Library, Family] = ("official", family_of(found.config))
    found.state, found.layout = to_ours(tensors, layout), layout
    return found


def _without(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(start): tensor for key, tensor in tensors.items()}

"""Kind `vit`: forward passes, layers, crops, gradients, and bfloat16 rotary tables."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.contracts import Features

from ..case import Case
from ..networks import check_gradients, official_backbone, official_network, vit_config

PROBE_BOUND = 7e-5
"""A sum with heavy cancellation: the README's exception for `out/probe_loss` in all ViT cases.

Where a JSON allows as much for the whole group, it is on account of this one number.
"""


def read(case: Case) -> None:
    constants = case.settings["constants"]
    constants.skip("activation", "attention_scale", because="sentences; the results prove them")
    case.bounds["out"] = 1e-5
    official = case.settings["config"]
    assert official["drop_path_rate"] == 0.0
    config = vit_config(official, constants["norm_eps"])
    weights = case.tensors("w/")
    network = official_network(weights, config, case.dtype)
    count = len(case.keys("in/x"))
    with torch.no_grad():
        for number in range(count):
            images = case.tensor(f"in/x{number}")
            mask = case.tensor(f"in/mask{number}")
            check_group(case, f"out/ff_nomask_{number}", network, images, None)
            check_group(case, f"out/ff_masked_{number}", network, images, mask)
            _check_layers(case, network, images, number)
        case.check("out/forward_0", network(case.tensor("in/x0")).cls)
        frozen = official_backbone(weights, config)
        case.check("out/forward_0", frozen(case.tensor("in/x0")).cls)
    _check_crops(case, network)
    if case.keys("outbf/"):
        changed = vit_config(official, constants["norm_eps"], rope_dtype="bf16")
        rounded = weights | case.tensors("w_rope_bf16/")
        network = official_network(rounded, changed, case.dtype)
        case.check("w_rope_bf16/rope_embed.periods", network.rope_embed.periods)
        network.rope_embed.reset_parameters()
        case.check("w_rope_bf16/rope_embed.periods", network.rope_embed.periods)
        with torch.no_grad():
            check_group(case, "outbf/ff_nomask_0", network, case.tensor("in/x0"), None)


def check_features(case: Case, prefix: str, features: Features, before_norm: Tensor) -> None:
    """The four results that the official network returns for a group of crops."""
    case.check(f"{prefix}/x_norm_clstoken", features.cls)
    case.check(f"{prefix}/x_storage_tokens", features.registers)
    case.check(f"{prefix}/x_norm_patchtokens", features.patches)
    case.check(f"{prefix}/x_prenorm", before_norm)


def check_group(case: Case, prefix: str, network: Any, images: Tensor, mask: Tensor | None) -> None:
    """One group by itself."""
    (features,) = network.forward_crops([images], [mask])
    (before_norm,) = network.encode([images], [mask])
    check_features(case, prefix, features, before_norm)


def _numbers(case: Case, call: str) -> list[int]:
    """The block numbers in the text of a call: `n=[0, 2]`, or `n=2` for the last two."""
    (text,) = [text for text in case.calls if text.startswith(call)]
    listed = re.search(r"n=\[([\d, ]+)\]", text)
    if listed:
        return [int(number) for number in listed[1].split(",")]
    last = re.search(r"n=(\d+)", text)
    assert last
    return list(range(-int(last[1]), 0))


def _check_layers(case: Case, network: Any, images: Tensor, number: int) -> None:
    wanted = _numbers(case, "out/gil_last_")
    features = network(images, layers=wanted)
    for index, (block, (cls, patches)) in enumerate(zip(wanted, features.layers, strict=True)):
        place = f"out/gil_last_{number}/{index}"
        case.check(f"{place}/cls", cls)
        case.check(f"{place}/patch", patches)
        # Features keep no registers of earlier blocks; a network that ends there returns them.
        shorter = copy.copy(network)
        shorter._modules = dict(network._modules)
        shorter.blocks = nn.ModuleList(network.blocks[: block % network.depth + 1])
        case.check(f"{place}/extra", shorter(images).registers)
    wanted = _numbers(case, "out/gil_list_")
    features = network(images, layers=wanted, norm=False)
    for index, (_, patches) in enumerate(features.layers):
        as_map = patches.mT.unflatten(-1, features.grid)
        case.check(f"out/gil_list_{number}/{index}/patch_nchw", as_map)


def _check_crops(case: Case, network: Any) -> None:
    crops = [case.tensor("in/list_global"), case.tensor("in/list_local")]
    masks = [case.tensor("in/list_mask"), None]
    for mode in ("eval", "train"):
        if not case.keys(f"out/list_{mode}"):
            continue
        network.train(mode == "train")
        found = network.forward_crops(crops, masks)
        tokens = network.encode(crops, masks)
        for group, features, before_norm in zip(("global", "local"), found, tokens, strict=True):
            check_features(case, f"out/list_{mode}_{group}", features, before_norm)
    wide, near = network.forward_crops(crops, masks)
    loss = (
        (wide.cls * case.tensor("in/probe_global_cls")).sum()
        + (near.cls * case.tensor("in/probe_local_cls")).sum()
        + (wide.patches * case.tensor("in/probe_global_patch")).sum()
    )
    case.check("out/probe_loss", loss, bound=PROBE_BOUND)
    check_gradients(case, network, loss)
    network.eval()

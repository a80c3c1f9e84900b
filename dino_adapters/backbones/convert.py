"""Checkpoints of any layout into tensors of our names, and back; complete, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.backbones.convert_convnext import (
    official_convnext_to_ours,
    ours_to_timm_convnext,
    ours_to_transformers_convnext,
    timm_convnext_to_ours,
    transformers_convnext_to_ours,
)
from dino_adapters.backbones.convert_learned import (
    has_learned_positions,
    ours_to_timm_learned,
    timm_learned_to_ours,
)
from dino_adapters.backbones.convert_vit import (
    State,
    count_names,
    effective_bias,
    official_vit_to_ours,
    ours_to_timm_vit,
    ours_to_transformers_vit,
    timm_vit_to_ours,
    transformers_vit_to_ours,
)
from dino_adapters.contracts import WeightsError
from dino_adapters.runtime.console import Notices

Library = Literal["official", "timm", "transformers"]
Family = Literal["vit", "convnext"]

_TO_OURS: dict[tuple[Library, Family], Callable[[Mapping[str, Tensor]], State]] = {
    ("official", "vit"): official_vit_to_ours,
    ("official", "convnext"): official_convnext_to_ours,
    ("timm", "vit"): timm_vit_to_ours,
    ("timm", "convnext"): timm_convnext_to_ours,
    ("transformers", "vit"): transformers_vit_to_ours,
    ("transformers", "convnext"): transformers_convnext_to_ours,
}


def recognise(state: Mapping[str, Tensor]) -> tuple[Library, Family] | None:
    """Whose names these are; our own count as official. None: no network of this family.

    With learned positions a mask token tells ours and DINOv2's from timm's and DINO's.
    """
    keys = set(state)
    prefixed = {key.removeprefix("model.") for key in keys}
    if "embeddings.patch_embeddings.weight" in keys:
        return "transformers", "vit"
    if has_learned_positions(state):
        return ("official" if "mask_token" in keys else "timm"), "vit"
    if "patch_embed.proj.weight" in keys and "pos_embed" not in keys:
        if keys & {"mask_token", "rope_embed.periods", "storage_tokens", "register_tokens"}:
            return "official", "vit"
        return ("timm", "vit") if "blocks.0.attn.qkv.weight" in keys else None
    if "downsample_layers.0.0.weight" in keys:
        return "official", "convnext"
    if "stages.0.downsample_layers.0.weight" in prefixed:
        return "transformers", "convnext"
    if {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"} <= keys:
        return "timm", "convnext"
    return None


def to_ours(state: Mapping[str, Tensor], layout: tuple[Library, Family]) -> State:
    """Tensors by our names.

    Raises:
        WeightsError: a tensor has no place in our networks.
    """
    if layout == ("timm", "vit") and "pos_embed" in state:
        return timm_learned_to_ours(state)
    return _TO_OURS[layout](state)


def to_timm(state: Mapping[str, Tensor], family: Family) -> State:
    """Tensors of our names by timm's, contiguous and ready to be saved.

    Raises:
        WeightsError: timm's network has no place for one.
    """
    if family == "convnext":
        made = ours_to_timm_convnext(state)
    else:
        made = (ours_to_timm_learned if "pos_embed" in state else ours_to_timm_vit)(state)
    return {k: v.contiguous() for k, v in made.items() if v.numel()}


def to_transformers(state: Mapping[str, Tensor], family: Family) -> State:
    """Tensors of our names by transformers', contiguous and ready to be saved.

    Raises:
        WeightsError: transformers' network has no place for one.
    """
    vit = family == "vit"
    made = ours_to_transformers_vit(state) if vit else ours_to_transformers_convnext(state)
    return {key: tensor.contiguous() for key, tensor in made.items()}


def strip_wrappers(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The backbone inside what a trainer saved: `{"teacher": {"backbone.*"}}` or a flat dict.

    Projection heads of a trainer's export are dropped by name; `torch.compile`'s prefix too.

    Raises:
        WeightsError: it holds no tensors, or things that are none.
    """
    for wrapper in ("teacher", "state_dict", "model"):
        inner = state.get(wrapper)
        if isinstance(inner, Mapping):
            state = inner
    names = [str(key).replace("_orig_mod.", "") for key in state]
    found = dict(zip(names, state.values(), strict=True))
    if any(name.startswith("backbone.") for name in found):
        strangers = [
            n for n in found if not n.startswith(("backbone.", "dino_head.", "ibot_head."))
        ]
        if strangers:
            raise WeightsError(
                f"Beside the backbone the checkpoint holds {count_names(strangers)}. A trainer's "
                "export has backbone.*, dino_head.* and ibot_head.* only: save it again."
            )
        start = "backbone."
        found = {n.removeprefix(start): v for n, v in found.items() if n.startswith(start)}
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        held = f"things that are no tensors ({', '.join(others[:3])})" if others else "no tensors"
        raise WeightsError(
            f"The checkpoint holds {held}. A flat dict of tensors is expected, or "
            "{'teacher': {'backbone.…': …}}: save the backbone's state_dict."
        )
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def settle_biases(state: State, config: ViTConfig, notices: Notices) -> State:
    """Applies the rule for masked biases of the key, and says what the file holds.

    A mask in the file counts, all-zero ones included: the distilled networks were published so,
    and it means that they act without qkv bias. A missing mask is `[1, 0, 1]`. NaN is refused.

    Raises:
        WeightsError: a mask is not finite.
    """
    result = dict(state)
    names = [key for key in state if key.endswith(".attn.qkv.bias")]
    for name in names:
        mask = state.get(f"{name}_mask")
        if mask is not None and not torch.isfinite(mask).all():
            raise WeightsError(
                f"{name}_mask holds NaN or infinite values: the network was saved before it was "
                "initialised. Save it again, or remove the mask for the usual [1, 0, 1]."
            )
        if not config.qkv_bias:
            if not effective_bias(state, int(name.split(".")[1])).any():
                notices.add("Biases of q, k and v that are 0 in effect were left out", name)
                result.pop(name)
                result.pop(f"{name}_mask", None)
        elif not config.mask_k_bias:
            if mask is not None and bool((mask == 1).all()):
                result.pop(f"{name}_mask")
        elif mask is None:
            one = torch.ones_like(state[name].chunk(3)[0])
            result[f"{name}_mask"] = torch.cat([one, torch.zeros_like(one), one])
            notices.add("The file holds no bias_mask; [1, 0, 1] is used: q and v biases act", name)
        elif not mask.any():
            notices.add(
                "The file's bias_mask is all zero, as in the distilled DINOv3 releases: the biases "
                "of q and v have no effect and would not learn. It was kept",
                f"{name}_mask",
            )
    return result


def fill_untold(state: State, network: nn.Module, layout: tuple[Library, Family]) -> State:
    """Adds what timm and transformers do not keep: rope periods, computed from the architecture."""
    own = network.state_dict()
    result = {key: tensor for key, tensor in state.items() if tensor.numel() or key in own}
    empty = [key for key, tensor in own.items() if not tensor.numel()]
    recomputed = ["rope_embed.periods"] if layout[0] != "official" else []
    for key in (*empty, *recomputed):
        if key in own:
            result.setdefault(key, own[key])
    return result


def fit(network: nn.Module, state: Mapping[str, Tensor], whose: str) -> None:
    """Loads every tensor, or none; values take the dtype of the network's own.

    Raises:
        WeightsError: names missing, unexpected, mis-shaped and non-finite tensors.
    """
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shared = [key for key in own if key in state]
    shapes = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in shared
        if state[key].shape != own[key].shape
    ]
    wrong = [
        f"{word} {count_names(names)}"
        for word, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", shapes),
        )
        if names
    ]
    if wrong:
        raise WeightsError(
            f"The weights of {whose} do not fit the network: {'; '.join(wrong)}. Nothing was "
            "loaded: name the checkpoint that belongs to it, or change architecture=."
        )
    spoilt = [key for key in shared if not torch.isfinite(state[key]).all()]
    if spoilt:
        raise WeightsError(
            f"The weights of {whose} hold NaN or infinite values in {count_names(spoilt)}. The "
            "training had diverged or the file is damaged: use an earlier checkpoint."
        )
    network.load_state_dict({key: state[key].to(own[key].dtype) for key in own}, strict=True)


def family_of(config: ViTConfig | ConvNeXtConfig) -> Family:
    """`vit` or `convnext`."""
    return "vit" if isinstance(config, ViTConfig) else "convnext"

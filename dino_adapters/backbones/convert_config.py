"""Architectures of timm's and transformers' DINOv3 networks as our configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.backbones.convert import Family, recognise, to_ours
from dino_adapters.backbones.convert_learned import LEARNED_TAG
from dino_adapters.backbones.infer import infer_convnext, infer_vit
from dino_adapters.contracts import WeightsError

TRANSFORMERS_TYPES: dict[str, Family] = {"dinov3_vit": "vit", "dinov3_convnext": "convnext"}


def config_of_timm(module: nn.Module) -> ViTConfig | ConvNeXtConfig | None:
    """Our config of a timm network, by its weights' shapes; None if it is no DINOv3.

    Of timm's plain vision transformers only those that we exported are ours again: timm resamples
    learned positions in another way, so that a published one would change its features.

    Works on the meta device too, so that nothing need be allocated to ask.
    """
    facts: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    architecture = str(facts.get("architecture", ""))
    is_vit = type(module).__name__ == "Eva" and "dinov3" in architecture
    is_plain = type(module).__name__ == "VisionTransformer" and facts.get("tag") == LEARNED_TAG
    is_convnext = type(module).__name__ == "ConvNeXt" and "dinov3" in str(facts.get("tag"))
    if not (is_vit or is_plain or is_convnext):
        return None
    state = timm_state(module)
    layout = ("timm", "convnext" if is_convnext else "vit")
    if recognise(state) != layout:
        return None
    try:
        ours = to_ours(state, layout)
    except WeightsError:  # a variant with further layers stays what it is
        return None
    if is_convnext:
        return infer_convnext(ours)
    network: Any = module
    told = {"num_heads": network.blocks[0].attn.num_heads, "norm_eps": network.norm.eps}
    if is_vit:
        base, augmented = rope_of_timm(network)
        told |= {"rope_base": base, **augmented}
    return infer_vit(ours, told)


def timm_state(module: nn.Module) -> dict[str, Tensor]:
    """A timm module's tensors, without those of a classifier."""
    classifier = ("head.fc.", "head.weight", "head.bias")
    state = module.state_dict()
    return {k: v for k, v in state.items() if not k.startswith(classifier)}


def rope_of_timm(network: Any) -> tuple[float, dict[str, Any]]:
    """The base of a timm network's rope, and its augmentation as fields of `ViTConfig`."""
    rope = network.rope
    names = ("shift", "jitter", "rescale")
    augmented = {f"rope_{name}": getattr(rope, f"{name}_coords", None) for name in names}
    return float(rope.temperature), augmented


def config_of_transformers(
    facts: Mapping[str, Any], state: Mapping[str, Tensor]
) -> ViTConfig | ConvNeXtConfig:
    """Our config of a transformers network.

    Args:
        facts: Its `config.json`; what is absent there has that library's default.
        state: Its tensors, by our names.

    Raises:
        WeightsError: another type of network, or an option that ours does not have.
    """
    family = TRANSFORMERS_TYPES.get(str(facts.get("model_type")))
    if family is None:
        raise WeightsError(
            f"config.json says model_type '{facts.get('model_type')}'. Ours are "
            f"{' and '.join(TRANSFORMERS_TYPES)}: name such a folder, or a network of timm."
        )
    gated = bool(facts.get("use_gated_mlp", False))
    activation = "silu" if gated else "gelu"
    eps = float(facts.get("layer_norm_eps", 1e-5 if family == "vit" else 1e-6))
    if facts.get("hidden_act", "gelu") != activation:
        raise WeightsError(
            f"config.json says hidden_act '{facts.get('hidden_act', 'gelu')}', and our network has "
            f"{activation} there. Load it with transformers itself."
        )
    if family == "convnext":
        if eps != 1e-6:
            raise WeightsError(
                f"config.json says layer_norm_eps {eps}, and our ConvNeXt has 1e-6. Load it with "
                "transformers itself."
            )
        return infer_convnext(state)
    return infer_vit(
        state,
        {
            "num_heads": int(facts.get("num_attention_heads", 6)),
            "norm_eps": eps,
            "rope_base": float(facts.get("rope_theta", 100.0)),
            "rope_shift": facts.get("pos_embed_shift"),
            "rope_jitter": facts.get("pos_embed_jitter"),
            "rope_rescale": facts.get("pos_embed_rescale", 2.0),
        },
    )


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is one of transformers' DINOv3 networks; needs no such import."""
    config = getattr(module, "config", None)
    return getattr(config, "model_type", None) in TRANSFORMERS_TYPES


def facts_of_transformers(module: nn.Module) -> dict[str, Any]:
    """The config of a transformers module as its `config.json` would say it."""
    return cast("Any", module).config.to_dict()

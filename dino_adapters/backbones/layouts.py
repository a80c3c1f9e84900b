"""Folders as timm and transformers write them: their configurations for our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.backbones.convert import to_timm, to_transformers
from dino_adapters.backbones.convert_learned import LEARNED_TAG
from dino_adapters.backbones.convert_vit import effective_bias
from dino_adapters.backbones.foreign import TimmNetwork
from dino_adapters.backbones.rope import make_periods
from dino_adapters.contracts import BackboneInfo

TIMM_EPS, TIMM_PLAIN_EPS = 1e-5, 1e-6
_TIMM_SIZES = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus"}
_TIMM_PLAIN_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
_TIMM_GATED = {"small": "small_plus", "base": "small_plus", "large": "small_plus"}
_TIMM_CONVNEXT = {(96, 9): "tiny", (96, 27): "small", (128, 27): "base", (192, 27): "large"}
ROUNDED = (
    "These weights hold rope periods rounded to bfloat16; this library computes them in float32, "
    "so that its features differ a little"
)
RESAMPLED = (
    "For other sizes than {side} x {side} pixels this library resamples the learned positions with "
    "antialiasing, so that its features differ there"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is to be written for one library, or why it cannot be.

    Attributes:
        why_not: The reason; None if it can.
        config: `config.json`.
        tensors: By that library's names.
        preprocessor: `preprocessor_config.json`, where the library can say how bands are read.
        note: What a user of it must know.
    """

    why_not: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] | None = None
    note: str | None = None

    def said(self) -> dict[str, Any]:
        """For the card."""
        if self.why_not is not None:
            return {"written": False, "why_not": self.why_not}
        return {"written": True, **({"note": self.note} if self.note else {})}


def timm_layout(
    config: ViTConfig | ConvNeXtConfig, state: Mapping[str, Tensor], info: BackboneInfo
) -> Layout:
    """What `timm.create_model("local-dir:…")` opens."""
    if isinstance(config, ConvNeXtConfig):
        return _timm_convnext(config, state, info)
    if config.positions == "learned":
        return _timm_plain(config, state, info)
    reason = _no_rope(config) or _no_norms(config)
    if config.norm_eps != TIMM_EPS:
        reason = f"the norms' eps is {config.norm_eps}; timm's DINOv3 networks have {TIMM_EPS}"
    if not (config.proj_bias and config.ffn_bias):
        reason = "it has no proj_bias or no ffn_bias; timm's always have"
    if config.qkv_bias and _key_bias_acts(config, state):
        reason = "the bias of its keys acts (mask_k_bias is off); timm's keys have none"
    if reason:
        return Layout(why_not=reason)
    gated = config.ffn == "swiglu"
    size = _TIMM_SIZES.get(config.embed_dim, "small")
    size = _TIMM_GATED.get(size, size) if gated else size.removesuffix("_plus")
    size = "large" if size == "huge" else size
    arguments = {
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "num_reg_tokens": config.registers,
        "mlp_ratio": _timm_ratio(config, state),
        "qkv_bias": config.qkv_bias,
        "swiglu_mlp": gated,
        # Every hidden width is a multiple of 1; 0 would choose another kind of gated layer.
        "swiglu_align_to": 1 if gated else 0,
        "init_values": config.layerscale,
        "rope_temperature": config.rope_base,
        "dynamic_img_size": True,
        "global_pool": "token",
    }
    name = f"vit_{size}_patch16_dinov3{'_qkvb' if config.qkv_bias else ''}"
    tensors = to_timm(state, "vit")
    facts = _timm_config(name, arguments, info, first="patch_embed.proj", classifier="head")
    return Layout(config=facts, tensors=tensors, note=_rounded(config, state))


def transformers_layout(
    config: ViTConfig | ConvNeXtConfig, state: Mapping[str, Tensor], info: BackboneInfo
) -> Layout:
    """What `transformers.AutoModel.from_pretrained` opens."""
    reason = None if isinstance(config, ConvNeXtConfig) else _no_rope(config) or _no_norms(config)
    if config.layerscale is None and not reason:
        reason = "it has no layerscale; transformers' always have"
    if reason:
        return Layout(why_not=reason)
    processor, note = _preprocessor(info), None
    if processor is None:
        note = "No preprocessor: its bands or their ranges are not those of 8-bit RGB photographs"
    if isinstance(config, ConvNeXtConfig):
        facts = {
            "architectures": ["DINOv3ConvNextModel"],
            "model_type": "dinov3_convnext",
            "num_channels": config.in_channels,
            "depths": list(config.depths),
            "hidden_sizes": list(config.dims),
            "layer_norm_eps": 1e-6,
            "layer_scale_init_value": config.layerscale,
        }
        tensors = to_transformers(state, "convnext")
    else:
        gated = config.ffn == "swiglu"
        acts = config.qkv_bias and _key_bias_acts(config, state)
        facts = {
            "architectures": ["DINOv3ViTModel"],
            "model_type": "dinov3_vit",
            "patch_size": config.patch_size,
            "num_channels": config.in_channels,
            "hidden_size": config.embed_dim,
            "intermediate_size": _hidden(state),
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.num_heads,
            "num_register_tokens": config.registers,
            "hidden_act": "silu" if gated else "gelu",
            "use_gated_mlp": gated,
            "layer_norm_eps": config.norm_eps,
            "rope_theta": config.rope_base,
            "query_bias": config.qkv_bias,
            "key_bias": acts,
            "value_bias": config.qkv_bias,
            "proj_bias": config.proj_bias,
            "mlp_bias": config.ffn_bias,
            "layerscale_value": config.layerscale,
            "pos_embed_shift": config.rope_shift,
            "pos_embed_jitter": config.rope_jitter,
            "pos_embed_rescale": config.rope_rescale,
        }
        tensors = to_transformers(state, "vit")
        if not acts:  # an unmasked bias of 0 is still in our state
            tensors = {k: t for k, t in tensors.items() if not k.endswith("k_proj.bias")}
        note = ". ".join(filter(None, [note, _rounded(config, state)])) or None
    common = {"image_size": info.size, "dtype": "float32", "license": info.licence}
    return Layout(config={**facts, **common}, tensors=tensors, preprocessor=processor, note=note)


def foreign_layout(network: TimmNetwork, info: BackboneInfo) -> Layout:
    """Timm's own folder for a network of timm."""
    cfg = network.model.default_cfg
    name = network.name.partition(".")[0]
    facts = _timm_config(
        name,
        {key: value for key, value in network.arguments.items() if key != "num_classes"},
        info,
        first=cfg.get("first_conv"),
        classifier=cfg.get("classifier"),
    )
    # timm rebuilds networks of one fixed size from this.
    facts["pretrained_cfg"]["fixed_input_size"] = bool(cfg.get("fixed_input_size", False))
    facts["pretrained_cfg"]["pool_size"] = cfg.get("pool_size")
    facts["pretrained_cfg"]["tag"] = "exported"
    tensors = {k: t.detach().contiguous() for k, t in network.model.state_dict().items()}
    return Layout(config=facts, tensors=tensors)


def _timm_plain(config: ViTConfig, state: Mapping[str, Tensor], info: BackboneInfo) -> Layout:
    """Timm's VisionTransformer, which holds DINO and DINOv2."""
    reason = _no_norms(config)
    if config.norm_eps != TIMM_PLAIN_EPS:
        reason = f"the norms' eps is {config.norm_eps}; timm's networks have {TIMM_PLAIN_EPS}"
    if config.proj_bias != config.ffn_bias:
        reason = "one of proj_bias and ffn_bias is on; timm's networks have both or none"
    if reason:
        return Layout(why_not=reason)
    gated, side = config.ffn == "swiglu", config.position_grid * config.patch_size
    size = "giant" if gated else _TIMM_PLAIN_SIZES.get(config.embed_dim, "small")
    name = f"vit_{size}_patch16_224"
    if gated or config.registers or config.layerscale:
        size = "small" if size == "tiny" else size
        name = f"vit_{size}_patch14_{'reg4_' if config.registers else ''}dinov2"
    arguments = {
        "img_size": side,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "reg_tokens": config.registers,
        "no_embed_class": config.registers > 0,
        "mlp_ratio": _timm_ratio(config, state, 2 if gated else 1),
        "qkv_bias": config.qkv_bias,
        "proj_bias": config.proj_bias,
        "init_values": config.layerscale,
        "dynamic_img_size": True,
        "global_pool": "token",
    }
    facts = _timm_config(name, arguments, info, first="patch_embed.proj", classifier="head")
    facts["pretrained_cfg"]["tag"] = LEARNED_TAG
    note = RESAMPLED.format(side=side)
    return Layout(config=facts, tensors=to_timm(state, "vit"), note=note)


def _timm_convnext(
    config: ConvNeXtConfig, state: Mapping[str, Tensor], info: BackboneInfo
) -> Layout:
    if len(config.depths) != 4:
        return Layout(why_not=f"it has {len(config.depths)} stages; timm's ConvNeXt has 4")
    arguments = {
        "in_chans": config.in_channels,
        "depths": list(config.depths),
        "dims": list(config.dims),
        "ls_init_value": config.layerscale,
    }
    size = _TIMM_CONVNEXT.get((config.dims[0], config.depths[2]), "tiny")
    name = f"convnext_{size}"
    facts = _timm_config(name, arguments, info, first="stem.0", classifier="head.fc")
    return Layout(config=facts, tensors=to_timm(state, "convnext"))


def _timm_config(
    name: str, arguments: Mapping[str, Any], info: BackboneInfo, *, first: Any, classifier: Any
) -> dict[str, Any]:
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": info.embed_dim,
        "model_args": dict(arguments),
        "pretrained_cfg": {
            "tag": "dinov3",
            "custom_load": False,
            "input_size": [len(info.bands), info.size, info.size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": first,
            "classifier": classifier,
            "license": info.licence,
        },
    }


def _preprocessor(info: BackboneInfo) -> dict[str, Any] | None:
    plain_rgb = all((band.low, band.high) == (0.0, 255.0) for band in info.bands)
    if tuple(band.name for band in info.bands) != ("red", "green", "blue") or not plain_rgb:
        return None
    return {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "do_resize": True,
        "size": {"height": info.size, "width": info.size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
    }


def _no_rope(config: ViTConfig) -> str | None:
    if config.positions == "learned":
        return "its positions are learned; that library's network has rotary ones"
    if config.rope_base is None:
        return "its rotary periods run from a smallest to a largest; that library knows a base only"
    if config.rope_coordinates != "separate":
        return f"its rope_coordinates are '{config.rope_coordinates}'; that library has 'separate'"
    if config.rope_dtype != "fp32":
        return f"its rotary tables are {config.rope_dtype}; that library's are fp32"
    return None


def _no_norms(config: ViTConfig) -> str | None:
    if config.norm != "layernorm":
        return f"its norms are {config.norm}; that library has LayerNorm"
    if config.untie_cls_norm:
        return "CLS and registers have a final norm of their own; that library has one for all"
    return None


def _key_bias_acts(config: ViTConfig, state: Mapping[str, Tensor]) -> bool:
    biases = (effective_bias(state, block) for block in range(config.depth))
    return any(bool(bias.chunk(3)[1].any()) for bias in biases)


def _hidden(state: Mapping[str, Tensor]) -> int:
    gated = state.get("blocks.0.mlp.w1.weight")
    return (state["blocks.0.mlp.fc1.weight"] if gated is None else gated).shape[0]


def _timm_ratio(config: ViTConfig, state: Mapping[str, Tensor], times: int = 1) -> float:
    """Timm's ratio is of the width used, also for SwiGLU; it rounds the product down.

    `times` is 2 where gate and value are one matrix, whose width timm names.
    """
    hidden = times * _hidden(state)
    ratio = hidden / config.embed_dim
    return ratio if int(config.embed_dim * ratio) == hidden else (hidden + 0.5) / config.embed_dim


def _rounded(config: ViTConfig, state: Mapping[str, Tensor]) -> str | None:
    periods = state["rope_embed.periods"].float().cpu()
    exact = make_periods(config.embed_dim // config.num_heads, base=config.rope_base)
    return None if torch.allclose(periods, exact, rtol=1e-5, atol=0) else ROUNDED

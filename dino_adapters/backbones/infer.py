"""The architecture of a checkpoint, read off the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from dino_adapters.backbones.config import ConvNeXtConfig, ViTConfig
from dino_adapters.backbones.positions import table_side
from dino_adapters.contracts import RecipeError, WeightsError
from dino_adapters.runtime.lookup import nearest

Config = ViTConfig | ConvNeXtConfig
AnyConfig = TypeVar("AnyConfig", bound=Config)

HEAD_DIM, WIDE_HEAD_DIM, WIDE = 64, 128, 4096
"""Channels per head of all published DINOv3 networks, and of the one that is 4096 wide."""

BASE_TOLERANCE = 0.02
"""Published files hold rope periods rounded to bfloat16, so that a base is only known to 1 %."""


def infer_vit(state: Mapping[str, Tensor], changes: Mapping[str, Any] | None = None) -> ViTConfig:
    """The architecture behind a state dict of our names.

    Not in a file, and therefore assumed: LayerNorm's eps (1e-5, as published), the augmentation of
    positions (rescale 2), the layerscale's start. The number of heads follows from the rope
    periods where they are kept, else from heads of 64 channels (128 for a width of 4096). A table
    of learned positions means DINO or DINOv2: eps 1e-6, and biases of the key that act.

    Args:
        state: Tensors by our names.
        changes: Fields of `ViTConfig` that are known better.

    Raises:
        WeightsError: a defining tensor is absent, or the number of heads cannot be told.
        RecipeError: a change names an unknown field.
    """
    for key in ("patch_embed.proj.weight", "cls_token", "norm.weight"):
        if key not in state:
            raise WeightsError(
                f"The checkpoint holds no {key}, so it is no DINOv3 vision transformer. Name the "
                "backbone's own file; heads and optimiser states are of no use here."
            )
    dim, channels, patch = state["patch_embed.proj.weight"].shape[:3]
    registers = state.get("register_tokens")
    bias = state.get("blocks.0.attn.qkv.bias")
    mask = state.get("blocks.0.attn.qkv.bias_mask")
    table = state.get("pos_embed")
    swiglu = "blocks.0.mlp.w1.weight" in state
    hidden = _size(state, "blocks.0.mlp.w1.weight" if swiglu else "blocks.0.mlp.fc1.weight")
    changes = dict(changes or {})
    fields: dict[str, Any] = {
        "embed_dim": dim,
        "depth": _blocks(state, r"blocks\.(\d+)\."),
        "num_heads": _heads(state, dim, changes),
        "patch_size": patch,
        "in_channels": channels,
        "registers": 0 if registers is None else registers.shape[1],
        "ffn": "swiglu" if swiglu else "mlp",
        "ffn_ratio": _swiglu_ratio(hidden, dim) if swiglu else _exact_ratio(hidden, dim),
        "swiglu_align": 8 if hidden % 8 == 0 else 1,
        "qkv_bias": bias is not None,
        # Without a mask in the file, a key's bias that is not 0 was learned and must act.
        "mask_k_bias": mask is not None
        or bias is None
        or not (table is not None or bias.chunk(3)[1].any()),
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": f"blocks.0.mlp.{'w1' if swiglu else 'fc1'}.bias" in state,
        "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "norm": "layernorm" if "norm.bias" in state else "rmsnorm",
        "untie_cls_norm": "cls_norm.weight" in state,
        "untie_local_cls_norm": "local_cls_norm.weight" in state,
        **_rope(state.get("rope_embed.periods")),
        **_learned(table),
    }
    return _changed(ViTConfig(**fields), changes)


def infer_convnext(
    state: Mapping[str, Tensor], changes: Mapping[str, Any] | None = None
) -> ConvNeXtConfig:
    """The architecture behind a state dict of our names.

    Raises:
        WeightsError: a defining tensor is absent.
        RecipeError: a change names an unknown field.
    """
    stages = _blocks(state, r"stages\.(\d+)\.")
    depths = tuple(_blocks(state, rf"stages\.{stage}\.(\d+)\.") for stage in range(stages))
    dims = tuple(_size(state, f"stages.{stage}.0.dwconv.weight") for stage in range(stages))
    stem = state.get("downsample_layers.0.0.weight")
    if stem is None or not depths or 0 in depths:
        raise WeightsError(
            "The checkpoint lacks the stem or a stage, so it is no complete ConvNeXt. Fetch or "
            "save it again."
        )
    found = ConvNeXtConfig(
        depths=depths,
        dims=dims,
        in_channels=stem.shape[1],
        layerscale=1e-6 if "stages.0.0.gamma" in state else None,
    )
    return _changed(found, dict(changes or {}))


def config_from(kind: type[Config], fields: Mapping[str, Any]) -> Config:
    """A config from JSON, where tuples have become lists.

    Raises:
        RecipeError: a field is unknown or absent.
    """
    _check_fields(kind, fields)
    given: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()
    }
    try:
        return kind(**given)
    except TypeError as error:
        raise RecipeError(f"The architecture is incomplete: {error}. Add the field.") from error


def adjust(config: Config, changes: object) -> Config:
    """`config` with changes: None, a mapping of fields, or a whole config that replaces it.

    Raises:
        RecipeError: a field is unknown, or the whole config is of the other family.
    """
    if changes is None:
        return config
    if isinstance(changes, Mapping):
        return _changed(config, changes)
    if isinstance(changes, type(config)):
        return changes
    raise RecipeError(
        f"architecture is a {type(changes).__name__}, and the weights are those of a "
        f"{type(config).__name__.removesuffix('Config')}. Give a {type(config).__name__}, or a "
        "mapping of the fields to change."
    )


def _changed(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    _check_fields(type(config), changes)
    return dataclasses.replace(config, **changes)


def _check_fields(kind: type, changes: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for name in changes:
        if name not in known:
            raise RecipeError(f"{kind.__name__} has no field '{name}'. {nearest(name, known)}")


def _size(state: Mapping[str, Tensor], key: str) -> int:
    if key not in state:
        raise WeightsError(
            f"The checkpoint holds no {key}, so the size of the network cannot be told. Fetch or "
            "save it again, or give architecture=."
        )
    return state[key].shape[0]


def _blocks(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _heads(state: Mapping[str, Tensor], dim: int, changes: Mapping[str, Any]) -> int:
    if "num_heads" in changes:
        return changes["num_heads"]
    periods = state.get("rope_embed.periods")
    head = WIDE_HEAD_DIM if dim == WIDE else HEAD_DIM
    if periods is not None:
        head = 4 * periods.numel()
    if dim % head:
        raise WeightsError(
            f"The network is {dim} wide, which is no multiple of {head}, so the number of heads is "
            "not in the file. Give architecture={'num_heads': …}."
        )
    return dim // head


def _exact_ratio(hidden: int, dim: int) -> float:
    """The ratio whose product with `dim`, rounded down, is `hidden`."""
    ratio = hidden / dim
    while int(dim * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _swiglu_ratio(hidden: int, dim: int) -> float:
    """The un-reduced ratio: SwiGLU takes two thirds of it, rounded down."""
    return _exact_ratio(math.ceil(hidden * 1.5), dim)


def _rope(periods: Tensor | None) -> dict[str, Any]:
    """Fields of the rope for periods that are not those of base 100."""
    if periods is None or periods.numel() < 2 or not torch.isfinite(periods.float()).all():
        return {}
    first, last, count = float(periods[0]), float(periods[-1]), periods.numel()
    if abs(first - 1.0) > BASE_TOLERANCE:
        return {"rope_base": None, "rope_min_period": first, "rope_max_period": last}
    base = last ** (count / (count - 1))
    return {} if abs(base / 100.0 - 1.0) < BASE_TOLERANCE else {"rope_base": base}


def _learned(table: Tensor | None) -> dict[str, Any]:
    """Fields of a network with a table of learned positions."""
    if table is None:
        return {}
    side = table_side(table.shape[1])
    if side is None:
        raise WeightsError(
            f"pos_embed has {table.shape[1]} rows. One for CLS and those of a square grid are "
            "expected (1 + 14 * 14 = 197): name another checkpoint."
        )
    return {"positions": "learned", "position_grid": side, "norm_eps": 1e-6}

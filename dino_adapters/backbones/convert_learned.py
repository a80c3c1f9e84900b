"""Key maps of vision transformers with learned positions: ours <-> timm's VisionTransformer.

Pure functions of dicts. timm's names are those of DINO's files too (arXiv 2104.14294). timm differs
from ours in the registers' name, in gated layers (gate and value are one matrix), and in what the
position table holds: a row for CLS where there are no registers, else rows for patches alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_adapters.backbones.convert_vit import State, effective_bias, refuse_unknown
from dino_adapters.backbones.positions import table_side
from dino_adapters.contracts import WeightsError

LEARNED_TAG = "learned"
"""Tag of the timm folders that we write for such networks; by it they become ours when read."""

_PARTS = ("weight", "bias")
_LAYERS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_BLOCK = {f"{layer}.{part}" for layer in _LAYERS for part in _PARTS} | {"ls1.gamma", "ls2.gamma"}
_ROOT = {f"{layer}.{part}" for layer in ("patch_embed.proj", "norm") for part in _PARTS}
_ROOT |= {"cls_token", "pos_embed"}
_NAME = re.compile(r"(blocks\.\d+\.)(.+)")
_GATED = re.compile(r"mlp\.w([123])\.(weight|bias)")


def has_learned_positions(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a plain vision transformer's, without a classifier, by its names."""
    needed = {"pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    return needed <= set(state) and "head.weight" not in state and state["pos_embed"].ndim == 3


def timm_learned_to_ours(state: Mapping[str, Tensor]) -> State:
    """Names of timm's VisionTransformer to ours.

    A table without a row for CLS (`no_embed_class`) gets one of zeros. There is no mask token in
    timm: it starts at zero again.

    Args:
        state: With the names that `has_learned_positions` asks for.

    Raises:
        WeightsError: a tensor has no place in our network, or the table is for no square grid.
    """
    first, last = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    gated = first is not None and last is not None and len(first) == 2 * last.shape[1]
    result, unknown = {}, []
    for key, tensor in state.items():
        match = _NAME.fullmatch(key)
        start, inner = match.groups() if match else ("", "")
        if key == "reg_token":
            result["register_tokens"] = tensor
        elif gated and inner in ("mlp.fc1.weight", "mlp.fc1.bias"):
            for name, half in zip(("w1", "w2"), tensor.chunk(2), strict=True):
                result[f"{start}mlp.{name}.{inner[8:]}"] = half
        elif gated and inner in ("mlp.fc2.weight", "mlp.fc2.bias"):
            result[f"{start}mlp.w3.{inner[8:]}"] = tensor
        elif key in _ROOT or inner in _BLOCK:
            result[key] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "timm")
    result["pos_embed"] = _with_cls(state["pos_embed"])
    result["mask_token"] = torch.zeros_like(state["cls_token"][0])
    return result


def ours_to_timm_learned(state: Mapping[str, Tensor]) -> State:
    """Our names to those of timm's VisionTransformer; `no_embed_class` where there are registers.

    With registers, CLS's position is added to the class token, as only their sum acts. Left behind,
    as inference does not need them: mask token and `local_cls_norm`.

    Raises:
        WeightsError: the network has a part that timm's cannot hold.
    """
    result, unknown = {}, []
    for key, tensor in state.items():
        match = _NAME.fullmatch(key)
        start, inner = match.groups() if match else ("", "")
        gated = _GATED.fullmatch(inner)
        if inner == "attn.qkv.bias":
            result[key] = effective_bias(state, int(key.split(".")[1]))
        elif gated and gated[1] == "1":
            halves = [tensor, state[f"{start}mlp.w2.{gated[2]}"]]
            result[f"{start}mlp.fc1.{gated[2]}"] = torch.cat(halves)
        elif gated and gated[1] == "3":
            result[f"{start}mlp.fc2.{gated[2]}"] = tensor
        elif key == "register_tokens":
            result["reg_token"] = tensor
        elif key in _ROOT or inner in _BLOCK:
            result[key] = tensor
        elif not (gated or inner == "attn.qkv.bias_mask" or _training_only(key)):
            unknown.append(key)
    refuse_unknown(unknown, "our network", "timm's VisionTransformer")
    if result["reg_token"].shape[1]:
        table = result["pos_embed"]
        result["cls_token"] = result["cls_token"] + table[:, :1]
        result["pos_embed"] = table[:, 1:]
    return result


def _training_only(key: str) -> bool:
    return key == "mask_token" or key.startswith("local_cls_norm.")


def _with_cls(table: Tensor) -> Tensor:
    """The table with a row for CLS, told by which of the two lengths is a square."""
    length = table.shape[1]
    if table_side(length) is not None:
        return table
    if table_side(length + 1) is None:
        raise WeightsError(
            f"The position table has {length} rows. A square number is expected, or one more with "
            "CLS: load the network as timm's own, by its name."
        )
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)

"""Key maps of vision transformers: ours <-> official, timm (Eva), transformers (DINOv3ViT).

Pure functions of dicts. Ours are the official names with `register_tokens` for `storage_tokens`.
Source: DINOv3 (arXiv 2508.10104) for the network; the names are those of the published files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_adapters.contracts import WeightsError

State = dict[str, Tensor]

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"(?:model\.)?layer\.(\d+)\.(.+)")
_PARTS = ("weight", "bias")

# Inside a block, our name: the other's name. Only what is renamed and nothing more is listed, so
# that an unknown tensor is found out.
_SAME = {f"{norm}.{part}" for norm in ("norm1", "norm2") for part in _PARTS}
_TIMM_BLOCK = {
    **{name: name for name in sorted(_SAME)},
    "attn.qkv.weight": "attn.qkv.weight",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    **{f"{layer}.{part}": f"{layer}.{part}" for layer in ("attn.proj",) for part in _PARTS},
}
_HF_BLOCK = {
    **{name: name for name in sorted(_SAME)},
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    **{f"attn.proj.{part}": f"attention.o_proj.{part}" for part in _PARTS},
}
_TIMM_MLP = {"fc1": "fc1", "fc2": "fc2"}
_TIMM_SWIGLU = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
_HF_MLP = {"fc1": "up_proj", "fc2": "down_proj"}
_HF_SWIGLU = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
_TIMM_ROOT = {
    "cls_token": "cls_token",
    "register_tokens": "reg_token",
    **{f"patch_embed.proj.{part}": f"patch_embed.proj.{part}" for part in _PARTS},
    **{f"norm.{part}": f"norm.{part}" for part in _PARTS},
}
_HF_ROOT = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    **{f"patch_embed.proj.{part}": f"embeddings.patch_embeddings.{part}" for part in _PARTS},
    **{f"norm.{part}": f"norm.{part}" for part in _PARTS},
}


def official_vit_to_ours(state: Mapping[str, Tensor]) -> State:
    """Official names to ours; every tensor is kept."""
    return {("register_tokens" if k == "storage_tokens" else k): v for k, v in state.items()}


def ours_to_official_vit(state: Mapping[str, Tensor]) -> State:
    """Our names to the official ones; every tensor is kept."""
    return {("storage_tokens" if k == "register_tokens" else k): v for k, v in state.items()}


def timm_vit_to_ours(state: Mapping[str, Tensor]) -> State:
    """Timm's Eva names (DINOv3 variants, with or without `_qkvb`) to ours.

    timm keeps no mask token, which starts at zero again, and no `rope_embed.periods`, which the
    network computes itself; the key's bias is 0 and masked.

    Raises:
        WeightsError: a tensor has no place in our network, or half of a bias pair is absent.
    """
    block = _inside(_TIMM_BLOCK, _TIMM_SWIGLU if _any(state, ".mlp.fc1_g.") else _TIMM_MLP)
    back = {theirs: ours for ours, theirs in block.items()}
    root = {theirs: ours for ours, theirs in _TIMM_ROOT.items()}
    result, unknown = {}, []
    biases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _BLOCK.fullmatch(key)
        inner = match[2] if match else ""
        if match and inner in ("attn.q_bias", "attn.v_bias"):
            biases.setdefault(match[1], {})[inner[5]] = tensor
        elif match and inner in back:
            result[f"blocks.{match[1]}.{back[inner]}"] = tensor
        elif key in root:
            result[root[key]] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "timm")
    for number, pair in biases.items():
        result.update(_joined_biases(f"blocks.{number}.attn.qkv", pair))
    if "cls_token" in result:
        result["mask_token"] = torch.zeros_like(result["cls_token"][0])
    return result


def ours_to_timm_vit(state: Mapping[str, Tensor]) -> State:
    """Our names to timm's Eva names; the `_qkvb` variant where there is a qkv bias.

    Left behind, as timm has no place for them and inference does not need them: mask token, rope
    periods, `local_cls_norm`.

    Raises:
        WeightsError: the network has a part that timm's cannot hold.
    """
    block = _inside(_TIMM_BLOCK, _TIMM_SWIGLU if _any(state, ".mlp.w1.") else _TIMM_MLP)
    result, unknown = {}, []
    for key, tensor in state.items():
        match = _BLOCK.fullmatch(key)
        inner = match[2] if match else ""
        if match and inner == "attn.qkv.bias":
            query, keys, value = effective_bias(state, int(match[1])).chunk(3)
            if keys.any():
                unknown.append(f"{key} (of the key)")
            result[f"blocks.{match[1]}.attn.q_bias"] = query.clone()
            result[f"blocks.{match[1]}.attn.v_bias"] = value.clone()
        elif match and inner in block:
            result[f"blocks.{match[1]}.{block[inner]}"] = tensor
        elif key in _TIMM_ROOT:
            result[_TIMM_ROOT[key]] = tensor
        elif not _training_only(key):
            unknown.append(key)
    refuse_unknown(unknown, "our network", "timm's DINOv3")
    return result


def transformers_vit_to_ours(state: Mapping[str, Tensor]) -> State:
    """Names of transformers' DINOv3ViTModel (`layer.N` or `model.layer.N`) to ours.

    Raises:
        WeightsError: a tensor has no place in our network, or a projection is incomplete.
    """
    block = _inside(_HF_BLOCK, _HF_SWIGLU if _any(state, ".mlp.gate_proj.") else _HF_MLP)
    back = {theirs: ours for ours, theirs in block.items()}
    root = {theirs: ours for ours, theirs in _HF_ROOT.items()}
    result, unknown = {}, []
    weights: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _LAYER.fullmatch(key)
        inner = match[2] if match else ""
        third = re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", inner)
        if match and third:
            (weights if third[2] == "weight" else biases).setdefault(match[1], {})[third[1]] = (
                tensor
            )
        elif match and inner in back:
            result[f"blocks.{match[1]}.{back[inner]}"] = tensor
        elif key == "embeddings.mask_token":
            result["mask_token"] = tensor.reshape(1, -1)
        elif key in root:
            result[root[key]] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "transformers")
    for number, thirds in weights.items():
        absent = [name for name in "qkv" if name not in thirds]
        if absent:
            raise WeightsError(
                f"Layer {number} lacks {', '.join(f'{name}_proj.weight' for name in absent)}. The "
                "checkpoint is incomplete: fetch or save it again."
            )
        result[f"blocks.{number}.attn.qkv.weight"] = torch.cat([thirds[name] for name in "qkv"])
    for number, thirds in biases.items():
        result.update(_joined_biases(f"blocks.{number}.attn.qkv", thirds))
    return result


def ours_to_transformers_vit(state: Mapping[str, Tensor]) -> State:
    """Our names to those of transformers' DINOv3ViTModel, as its files have them (`layer.N`).

    Left behind: rope periods (recomputed there) and `local_cls_norm` (training only).

    Raises:
        WeightsError: the network has a part that transformers' cannot hold.
    """
    block = _inside(_HF_BLOCK, _HF_SWIGLU if _any(state, ".mlp.w1.") else _HF_MLP)
    result, unknown = {}, []
    for key, tensor in state.items():
        match = _BLOCK.fullmatch(key)
        inner = match[2] if match else ""
        if match and inner == "attn.qkv.weight":
            for name, third in zip("qkv", tensor.chunk(3), strict=True):
                result[f"layer.{match[1]}.attention.{name}_proj.weight"] = third.clone()
        elif match and inner == "attn.qkv.bias":
            thirds = zip("qkv", effective_bias(state, int(match[1])).chunk(3), strict=True)
            masked = key + "_mask" in state
            for name, third in thirds:
                if name != "k" or not masked or third.any():
                    result[f"layer.{match[1]}.attention.{name}_proj.bias"] = third.clone()
        elif match and inner in block:
            result[f"layer.{match[1]}.{block[inner]}"] = tensor
        elif key == "mask_token":
            result["embeddings.mask_token"] = tensor.reshape(1, 1, -1)
        elif key in _HF_ROOT:
            result[_HF_ROOT[key]] = tensor
        elif not _training_only(key):
            unknown.append(key)
    refuse_unknown(unknown, "our network", "transformers' DINOv3ViTModel")
    return result


def effective_bias(state: Mapping[str, Tensor], block: int) -> Tensor:
    """The qkv bias `(3D,)` that the network of our names really adds: bias times its mask."""
    name = f"blocks.{block}.attn.qkv.bias"
    mask = state.get(f"{name}_mask")
    return state[name] if mask is None else state[name] * mask.to(state[name].dtype)


def refuse_unknown(unknown: list[str], whose: str, where: str = "our network") -> None:
    """Raises when tensors are left over.

    Raises:
        WeightsError: names the first few, and how many there are.
    """
    if unknown:
        raise WeightsError(
            f"{count_names(unknown)} of {whose} have no place in {where}. Nothing was converted: "
            "name another checkpoint, or load the network as it is."
        )


def count_names(names: list[str], shown: int = 4) -> str:
    """`3 tensors (a, b, c)`; long lists end in an ellipsis."""
    word = "tensor" if len(names) == 1 else "tensors"
    dots = ", …" if len(names) > shown else ""
    return f"{len(names)} {word} ({', '.join(sorted(names)[:shown])}{dots})"


def _joined_biases(name: str, thirds: Mapping[str, Tensor]) -> State:
    """One fused bias; a third that the other library leaves out is 0, and the key's is masked."""
    example = next(iter(thirds.values()))
    zero = torch.zeros_like(example)
    bias = torch.cat([thirds.get(third, zero) for third in "qkv"])
    if "k" in thirds:
        return {f"{name}.bias": bias}
    one = torch.ones_like(example)
    return {f"{name}.bias": bias, f"{name}.bias_mask": torch.cat([one, zero, one])}


def _inside(block: Mapping[str, str], mlp: Mapping[str, str]) -> dict[str, str]:
    layers = {f"mlp.{a}.{part}": f"mlp.{b}.{part}" for a, b in mlp.items() for part in _PARTS}
    return {**block, **layers}


def _any(state: Mapping[str, Tensor], part: str) -> bool:
    return any(part in key for key in state)


def _training_only(key: str) -> bool:
    return (
        key in ("mask_token", "rope_embed.periods")
        or key.startswith("local_cls_norm.")
        or key.endswith(".attn.qkv.bias_mask")
    )

"""Key maps of ConvNeXt: ours <-> official, timm, transformers (DINOv3ConvNext).

Pure functions of dicts. Ours are the official names without `norms.3`, a second name of `norm`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_adapters.backbones.convert_vit import State, refuse_unknown
from dino_adapters.contracts import WeightsError

_PARTS = ("weight", "bias")
_TIMM_BLOCK = {
    "dwconv": "conv_dw",
    "norm": "norm",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
}
_HF_BLOCK = {
    "dwconv": "depthwise_conv",
    "norm": "layer_norm",
    "pwconv1": "pointwise_conv1",
    "pwconv2": "pointwise_conv2",
}
_OUR_BLOCK = re.compile(r"stages\.(\d)\.(\d+)\.(.+)")
_OUR_DOWN = re.compile(r"downsample_layers\.(\d)\.([01])\.(weight|bias)")
_TIMM_STAGE = re.compile(r"stages\.(\d)\.blocks\.(\d+)\.(.+)")
_TIMM_DOWN = re.compile(r"stages\.(\d)\.downsample\.([01])\.(weight|bias)")
_TIMM_STEM = re.compile(r"stem\.([01])\.(weight|bias)")
_HF_STAGE = re.compile(r"(?:model\.)?stages\.(\d)\.layers\.(\d+)\.(.+)")
_HF_DOWN = re.compile(r"(?:model\.)?stages\.(\d)\.downsample_layers\.([01])\.(weight|bias)")


def official_convnext_to_ours(state: Mapping[str, Tensor]) -> State:
    """Official names to ours: `norms.3`, where present, must repeat `norm` and is dropped.

    Raises:
        WeightsError: `norms.3` and `norm` differ, so that one of them is not the trained one.
    """
    result = {key: tensor for key, tensor in state.items() if not key.startswith("norms.3.")}
    for part in _PARTS:
        second = state.get(f"norms.3.{part}")
        first = result.setdefault(f"norm.{part}", second) if second is not None else None
        if first is not None and second is not None and not torch.equal(first, second):
            raise WeightsError(
                f"norm.{part} and norms.3.{part} differ, and both name the final norm. The "
                "checkpoint is damaged or of another network: fetch it again."
            )
    return result


def ours_to_official_convnext(state: Mapping[str, Tensor]) -> State:
    """Our names to the official ones, `norms.3` included."""
    doubled = {f"norms.3.{part}": state[f"norm.{part}"] for part in _PARTS}
    return {**state, **doubled}


def timm_convnext_to_ours(state: Mapping[str, Tensor]) -> State:
    """Timm's ConvNeXt names to ours.

    Raises:
        WeightsError: a tensor has no place in our network (a classifier, a variant's layer).
    """
    inside = _back(_TIMM_BLOCK)
    result, unknown = {}, []
    for key, tensor in state.items():
        stage, down = _TIMM_STAGE.fullmatch(key), _TIMM_DOWN.fullmatch(key)
        stem = _TIMM_STEM.fullmatch(key)
        if stage and stage[3] in inside:
            result[f"stages.{stage[1]}.{stage[2]}.{inside[stage[3]]}"] = tensor
        elif down:
            result[f"downsample_layers.{down[1]}.{down[2]}.{down[3]}"] = tensor
        elif stem:
            result[f"downsample_layers.0.{stem[1]}.{stem[2]}"] = tensor
        elif key.startswith("head.norm."):
            result[key.removeprefix("head.")] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "timm")
    return result


def ours_to_timm_convnext(state: Mapping[str, Tensor]) -> State:
    """Our names to timm's ConvNeXt names.

    Raises:
        WeightsError: a tensor has no place in timm's.
    """
    inside = _forth(_TIMM_BLOCK)
    result, unknown = {}, []
    for key, tensor in state.items():
        block, down = _OUR_BLOCK.fullmatch(key), _OUR_DOWN.fullmatch(key)
        if block and block[3] in inside:
            result[f"stages.{block[1]}.blocks.{block[2]}.{inside[block[3]]}"] = tensor
        elif down and down[1] == "0":
            result[f"stem.{down[2]}.{down[3]}"] = tensor
        elif down:
            result[f"stages.{down[1]}.downsample.{down[2]}.{down[3]}"] = tensor
        elif key.startswith("norm."):
            result[f"head.{key}"] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "our network", "timm's ConvNeXt")
    return result


def transformers_convnext_to_ours(state: Mapping[str, Tensor]) -> State:
    """Names of transformers' DINOv3ConvNextModel (with or without `model.`) to ours.

    Raises:
        WeightsError: a tensor has no place in our network.
    """
    inside = _back(_HF_BLOCK)
    result, unknown = {}, []
    for key, tensor in state.items():
        stage, down = _HF_STAGE.fullmatch(key), _HF_DOWN.fullmatch(key)
        if stage and stage[3] in inside:
            result[f"stages.{stage[1]}.{stage[2]}.{inside[stage[3]]}"] = tensor
        elif down:
            result[f"downsample_layers.{down[1]}.{down[2]}.{down[3]}"] = tensor
        elif key.startswith("layer_norm."):
            result[key.removeprefix("layer_")] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "transformers")
    return result


def ours_to_transformers_convnext(state: Mapping[str, Tensor]) -> State:
    """Our names to those of transformers' DINOv3ConvNextModel, as its files have them.

    Raises:
        WeightsError: a tensor has no place there.
    """
    inside = _forth(_HF_BLOCK)
    result, unknown = {}, []
    for key, tensor in state.items():
        block, down = _OUR_BLOCK.fullmatch(key), _OUR_DOWN.fullmatch(key)
        if block and block[3] in inside:
            result[f"stages.{block[1]}.layers.{block[2]}.{inside[block[3]]}"] = tensor
        elif down:
            result[f"stages.{down[1]}.downsample_layers.{down[2]}.{down[3]}"] = tensor
        elif key.startswith("norm."):
            result[f"layer_{key}"] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "our network", "transformers' DINOv3ConvNextModel")
    return result


def _forth(block: Mapping[str, str]) -> dict[str, str]:
    names = {f"{a}.{part}": f"{b}.{part}" for a, b in block.items() for part in _PARTS}
    return {**names, "gamma": "gamma"}


def _back(block: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in _forth(block).items()}

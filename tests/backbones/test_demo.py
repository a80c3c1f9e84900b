"""The trained network of the `demo` extra."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dino_adapters.backbones import build_network
from dino_adapters.backbones import demo as demo_module
from dino_adapters.contracts import (
    MissingLibraryError,
    UnknownNameError,
    WeightsError,
)

WEIGHTS_FOLDER = Path(os.environ.get("DINO_ADAPTERS_WEIGHTS", "../shared/weights"))


class TestDemo:
    def test_its_numbers(self):
        network, info = build_network("demo:efficientnet_lite0")
        assert (info.licence, info.embed_dim, info.size) == ("Apache-2.0", 1280, 224)
        pixel = 200.0
        expected = (pixel - 127) / 128
        assert (pixel / 255 - info.mean[0]) / info.std[0] == pytest.approx(expected)
        assert network(torch.zeros(1, 3, 64, 64)).cls.shape == (1, 1280)

    def test_equals_the_reference_file(self):
        path = WEIGHTS_FOLDER / "tf_efficientnet_lite0.imagenet1k.fp16.safetensors"
        if not path.is_file():
            pytest.skip(f"{path} is absent; set DINO_ADAPTERS_WEIGHTS")
        network, _ = build_network("demo:efficientnet_lite0")
        reference = load_file(path)
        own = network.model.state_dict()
        heads = {name for name in reference if name.startswith("classifier.")}
        assert set(reference) - heads == set(own)
        for name, tensor in own.items():
            # Rounded to fp16 and no more: half a unit in the last place.
            assert torch.equal(tensor.to(reference[name].dtype), reference[name]), name
        loaded, info = build_network("tf_efficientnet_lite0", checkpoint=path)
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            a, b = network(images).cls, loaded(images).cls
        assert (a - b).abs().max() < 0.02 * a.abs().max()
        assert info.training == {"weights": path.name}

    def test_refusals(self, monkeypatch):
        with pytest.raises(UnknownNameError, match="no demo network called 'resnet'"):
            build_network("demo:resnet")
        network = demo_module.create_timm("tf_efficientnet_lite0")
        state = dict(network.model.state_dict())
        with pytest.raises(WeightsError, match="another version"):
            demo_module.in_order(network, dict(list(state.items())[1:]))
        swapped = {k.replace("bn1.weight", "bn1.wait"): v for k, v in state.items()}
        with pytest.raises(WeightsError, match="stands where"):
            demo_module.in_order(network, swapped)

        def absent(module, *, extra):
            raise MissingLibraryError(f"This needs '{module}': dino-adapters[{extra}]")

        monkeypatch.setattr(demo_module, "need", absent)
        with pytest.raises(MissingLibraryError, match=r"dino-adapters\[demo\]"):
            build_network("demo:efficientnet_lite0")

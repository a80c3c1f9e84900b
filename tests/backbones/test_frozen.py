from __future__ import annotations

import pytest
import torch

from dino_adapters.backbones import FrozenBackbone, build_network, load_backbone
from dino_adapters.contracts import Backbone, ShapeError, UnitsError


@pytest.fixture(params=["vitmicro8", "resnet10t"])
def frozen(request):
    return load_backbone(request.param)


def test_nothing_can_learn(frozen):
    network = frozen.network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    features = frozen(torch.randn(1, 3, 64, 64, requires_grad=True))
    assert not features.cls.requires_grad
    # Features serve as training inputs of heads: inference tensors could not.
    head = torch.nn.Linear(features.cls.shape[1], 2)
    head(features.cls).sum().backward()
    assert head.weight.grad is not None


def test_it_keeps_its_promise(frozen):
    promise: object = frozen
    assert isinstance(promise, Backbone)
    assert frozen.to("cpu") is frozen
    assert frozen.device.type == "cpu"
    with pytest.raises(AttributeError):
        frozen.info = None
    images = torch.randn(2, 3, 64, 96)
    assert torch.equal(frozen(images).cls, frozen(images).cls)
    assert torch.equal(frozen(images.double()).cls, frozen(images.double().float()).cls)


def test_wrong_images_are_refused(frozen):
    with pytest.raises(ShapeError, match=r"reads \(B, 3, H, W\) with the bands red, green, blue"):
        frozen(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ShapeError, match="nearest size is 64 x 64"):
        frozen(torch.zeros(1, 3, 67, 64))
    with pytest.raises(UnitsError, match=r"images of torch\.uint8"):
        frozen(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_attention_where_there_is_any():
    images = torch.randn(2, 3, 32, 48)
    attention = load_backbone("vitmicro8").cls_attention(images)
    assert attention is not None
    assert attention.shape == (2, 3, 24)
    assert (attention.sum(-1) < 1).all()  # the rest goes to class token and registers
    assert load_backbone("resnet10t").cls_attention(images) is None


def test_freezing_is_the_network_itself():
    network, info = build_network("vitmicro8", seed=4)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = network(images).cls
    assert torch.equal(FrozenBackbone(network, info)(images).cls, expected)
    assert torch.equal(load_backbone("vitmicro8", seed=4)(images).cls, expected)

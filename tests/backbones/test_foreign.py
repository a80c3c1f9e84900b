"""timm's networks as Features, against timm's own calls."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from dino_adapters.backbones import TimmNetwork
from dino_adapters.backbones.foreign import create_timm, first_convolution
from dino_adapters.contracts import (
    Network,
    RecipeError,
    ShapeError,
    UnknownNameError,
    WeightsError,
)

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
SMALL_VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 64}


def randomised(network, scatter):
    scatter(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture
def cnn(scatter):
    return randomised(create_timm("resnet10t"), scatter)


@pytest.fixture
def vit(scatter):
    return randomised(create_timm("vit_tiny_patch16_224", arguments=SMALL_VIT), scatter)


@torch.no_grad()
def test_a_cnns_tokens_are_its_last_map_and_its_pooled_vector(cnn):
    features = cnn(IMAGES, layers=(1, -1))
    last = cnn.model.forward_features(IMAGES)
    assert features.grid == (2, 3)
    for row in range(2):
        for column in range(3):
            pixel = last[:, :, row, column]
            assert torch.equal(features.patches[:, row * 3 + column], pixel)
    assert torch.equal(features.cls, cnn.model.forward_head(last, pre_logits=True))
    assert features.registers.shape == (2, 0, 512)
    maps = cnn.model.forward_intermediates(IMAGES, indices=[1, 4], intermediates_only=True)
    for (cls, patches), expected in zip(features.layers, maps, strict=True):
        assert torch.equal(patches, expected.flatten(2).transpose(1, 2))
        assert torch.allclose(cls, expected.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_a_vits_tokens_are_timms(vit, norm):
    features = vit(IMAGES, layers=(0, -1), norm=norm)
    if norm:
        whole = vit.model.forward_features(IMAGES)
        assert torch.equal(features.cls, whole[:, 0])
        assert torch.equal(features.patches, whole[:, 1:])
    pairs = vit.model.forward_intermediates(
        IMAGES, indices=[0, 2], norm=norm, return_prefix_tokens=True, intermediates_only=True
    )
    for (cls, patches), (spatial, prefix) in zip(features.layers, pairs, strict=True):
        assert torch.equal(cls, prefix[:, 0])
        assert torch.equal(patches, spatial.flatten(2).transpose(1, 2))
    assert torch.equal(features.layers[1][1], features.patches)
    assert features.grid == (4, 6)


@torch.no_grad()
def test_further_prefix_tokens_are_registers(scatter):
    network = randomised(create_timm("vit_small_patch14_reg4_dinov2", arguments={
        "depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 56}), scatter)  # fmt: skip
    images = torch.randn(1, 3, 28, 56)
    features = network(images)
    whole = network.model.forward_features(images)
    assert torch.equal(features.registers, whole[:, 1:5])
    assert (network.num_registers, network.patch_size, features.grid) == (4, 14, (2, 4))


@torch.no_grad()
def test_a_vit_without_class_token_pools_as_it_does(scatter):
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
    network = randomised(create_timm("vit_base_patch16_siglip_224", arguments=arguments), scatter)
    features = network(IMAGES)
    assert network.num_registers == 0
    expected = network.model.forward_head(network.model.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(features.cls, expected)
    assert not torch.allclose(features.cls, features.patches.mean(1), atol=0.1)


@torch.no_grad()
def test_a_network_that_widens_after_pooling_keeps_one_width(scatter):
    network = randomised(create_timm("mobilenetv3_small_050"), scatter)
    features = network(IMAGES)
    assert network.model.head_hidden_size != network.embed_dim
    assert features.cls.shape[-1] == features.patches.shape[-1] == network.embed_dim
    assert torch.allclose(features.cls, features.patches.mean(1))


@torch.no_grad()
def test_channels_last_maps_are_read_right():
    arguments = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    network = create_timm("swin_tiny_patch4_window7_224", arguments=arguments).eval()
    images = torch.randn(1, 3, 224, 224)
    features = network(images)
    assert torch.equal(features.patches, network.model.forward_features(images).flatten(1, 2))


def test_a_network_of_one_size_names_it():
    arguments = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    network = create_timm("beit_base_patch16_224", arguments=arguments).eval()
    assert network(torch.randn(1, 3, 224, 224)).grid == (14, 14)
    with pytest.raises(ShapeError, match=r"refuses images of \(96, 96\).*\(224, 224\)"):
        network(torch.randn(1, 3, 96, 96))


def test_batch_norm_never_moves(cnn):
    norms: list[Any] = [m for m in cnn.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean.clone(), m.weight.clone()) for m in norms]
    cnn.train()
    assert cnn.training
    assert not any(m.training for m in norms)
    optimiser = torch.optim.SGD(cnn.parameters(), lr=0.1)
    cnn(IMAGES).patches.square().mean().backward()
    optimiser.step()
    assert all(
        torch.equal(m.running_mean, mean) for m, (mean, _) in zip(norms, before, strict=True)
    )
    assert any(not torch.equal(m.weight, w) for m, (_, w) in zip(norms, before, strict=True))
    with torch.no_grad():
        assert torch.equal(cnn(IMAGES).cls, cnn.eval()(IMAGES).cls)


def test_crops_go_one_group_after_the_other(cnn):
    crops = [IMAGES, torch.randn(4, 3, 32, 32)]
    with torch.no_grad():
        found = cnn.forward_crops(crops, [None, None])
        assert all(torch.equal(f.cls, cnn(c).cls) for f, c in zip(found, crops, strict=True))
    with pytest.raises(RecipeError, match="resnet10t cannot hide patches"):
        cnn.forward_crops(crops, [torch.zeros(2, 6, dtype=torch.bool), None])
    assert cnn.supports_masks is False
    assert isinstance(cnn, Network)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 3, 65, 96), r"nearest size is 64 x 96"),
        ((1, 3, 10, 110), r"nearest size is 32 x 96"),
        ((1, 4, 64, 64), r"4 channels"),
        ((3, 64, 64), r"\(3, 64, 64\)"),
    ],
)
def test_images_that_do_not_fit(cnn, shape, match):
    with pytest.raises(ShapeError, match=match):
        cnn(torch.zeros(shape))


def test_layers_that_do_not_exist(cnn):
    with pytest.raises(UnknownNameError, match="Layer 7"):
        cnn(IMAGES, layers=(7,))


def test_weights_go_round_by_state_dict(cnn, vit, scatter):
    for network in (cnn, vit):
        again = create_timm(network.name, arguments=network.arguments, seed=9).eval()
        again.load_state_dict(network.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(again(IMAGES).patches, network(IMAGES).patches)


def test_arguments_are_kept_for_rebuilding(vit):
    assert vit.arguments == {"dynamic_img_size": True, "num_classes": 0, **SMALL_VIT}


def test_modules_without_maps_and_odd_stems_are_refused():
    with pytest.raises(WeightsError, match="Linear has no forward_intermediates"):
        TimmNetwork(nn.Linear(1, 1), name="x")
    network = TimmNetwork(timm.create_model("resnet10t", num_classes=0), name="resnet10t")
    network.model.default_cfg = {"first_conv": ("a", "b")}
    with pytest.raises(WeightsError, match="as its first convolution"):
        first_convolution(network)
    network.model.default_cfg = {"first_conv": "bn1"}
    with pytest.raises(WeightsError, match="first layer of resnet10t is BatchNorm"):
        first_convolution(network)

from pathlib import Path
from typing import Any

import pytest
import torch

from dino_adapters.backbones.catalog import CATALOG, RELEASED, find_released
from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.convnext import ConvNeXt
from dino_adapters.backbones.vit import VisionTransformer
from dino_adapters.contracts import IMAGENET_MEAN

MILLIONS = {
    "vitmicro8": 0.36,
    "vittiny16": 5.49,
    "vits16": 21.60,
    "vits16plus": 28.70,
    "vitb16": 85.67,
    "vitl16": 303.15,
    "vith16plus": 840.63,
    "vit7b16": 6716.04,
    "vits16_dino": 21.67,
    "vits14_dinov2": 22.06,
    "vitb14_dinov2": 86.58,
    "cnx_tiny": 27.82,
    "cnx_small": 49.5,
    "cnx_base": 87.6,
    "cnx_large": 196.2,
}
"""Published sizes without heads; the first two are ours."""

LEARNED = [name for name in CATALOG if "_dino" in name]

HIDDEN = {"vits16": 1536, "vits16plus": 1536, "vith16plus": 5120, "vit7b16": 8192}


def build(name: str) -> Any:
    config = CATALOG[name]
    with torch.device("meta"):
        if isinstance(config, ViTConfig):
            return VisionTransformer(config)
        return ConvNeXt(config)


def test_every_name_has_a_size():
    assert set(MILLIONS) == set(CATALOG)


@pytest.mark.parametrize("name", CATALOG)
def test_size_is_the_published_one(name):
    network = build(name)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    digits = len(str(MILLIONS[name]).split(".")[1]) if name.startswith("cnx") else 2
    assert round(count, digits) == MILLIONS[name]
    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.parametrize(("name", "width"), HIDDEN.items())
def test_hidden_width_is_the_published_one(name, width):
    mlp = build(name).blocks[0].mlp
    first = mlp.fc1 if name == "vits16" else mlp.w1
    assert first.out_features == width


@pytest.mark.parametrize("name", [n for n in CATALOG if n[:3] == "vit" and n not in LEARNED])
def test_released_settings(name):
    config = CATALOG[name]
    assert isinstance(config, ViTConfig)
    assert (config.registers, config.norm_eps) == (4, 1e-5)
    assert config.layerscale == (1.0 if name == "vitmicro8" else 1e-5)
    assert (config.rope_base, config.rope_rescale, config.rope_dtype) == (100.0, 2.0, "fp32")
    assert config.qkv_bias is (name != "vit7b16")


@pytest.mark.parametrize("name", LEARNED)
def test_settings_with_learned_positions(name):
    config = CATALOG[name]
    assert isinstance(config, ViTConfig)
    assert (config.positions, config.registers, config.norm_eps) == ("learned", 0, 1e-6)
    assert (config.qkv_bias, config.mask_k_bias) == (True, False)
    dinov2 = name.endswith("dinov2")
    assert config.layerscale == (1e-5 if dinov2 else None)
    assert (config.patch_size, config.position_grid) == ((14, 37) if dinov2 else (16, 14))
    assert LEARNED == ["vits16_dino", "vits14_dinov2", "vitb14_dinov2"]


@pytest.mark.parametrize("name", ["vitmicro8", "vittiny16", "vits16", "vits16_dino"])
def test_small_ones_run(name):
    config = CATALOG[name]
    assert isinstance(config, ViTConfig)
    network = VisionTransformer(config).eval()
    with torch.no_grad():
        features = network(torch.zeros(1, 3, 32, 48))
    assert features.cls.shape == (1, config.embed_dim)
    assert features.grid == (32 // config.patch_size, 48 // config.patch_size)


def test_released_files_are_known_by_their_digits():
    found = find_released(Path("dinov3_vits16_pretrain_lvd1689m-08c60483.pth"))
    assert found is not None
    assert (found.architecture, found.trained_on) == ("vits16", "lvd1689m")
    assert found.mean == IMAGENET_MEAN
    satellite = find_released(Path("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"))
    assert satellite is not None
    assert satellite.architecture == "vitl16"
    assert satellite.untie_local_cls_norm
    assert satellite.mean == (0.430, 0.411, 0.296)
    assert find_released(Path("my_weights.pth")) is None


def test_released_architectures_are_in_the_catalogue():
    assert {released.architecture for released in RELEASED.values()} == {
        name for name in CATALOG if name not in ("vitmicro8", "vittiny16", *LEARNED)
    }
    assert len(RELEASED) == 12
    assert all(len(digits) == 8 and int(digits, 16) for digits in RELEASED)

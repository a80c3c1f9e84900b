"""Folders that timm and transformers open unchanged, with equal outputs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import timm
import torch
import transformers

from dino_adapters.backbones import (
    ConvNeXt,
    ConvNeXtConfig,
    VisionTransformer,
    ViTConfig,
    build_network,
    export_backbone,
    load_backbone,
)
from dino_adapters.contracts import BackboneInfo, Band

NIR = Band("nir", "reflectance", 842.0, 0.0, 1.0)
TOLERANCE = 1e-5
SHAPES = {
    "mlp": ViTConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8),
    "nobias": ViTConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, qkv_bias=False),
    "swiglu": ViTConfig(
        embed_dim=72, depth=2, num_heads=3, patch_size=16, ffn="swiglu", ffn_ratio=5.3
    ),
    "odd": ViTConfig(
        embed_dim=64, depth=1, num_heads=1, registers=0, ffn="swiglu", swiglu_align=1,
        ffn_ratio=2.51, rope_base=50.0,
    ),
    "ratio": ViTConfig(embed_dim=48, depth=1, num_heads=3, registers=1, ffn_ratio=3.7778),
    "convnext": ConvNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
}  # fmt: skip


def made(config, scatter, **fields) -> tuple[Any, BackboneInfo]:
    network = VisionTransformer(config) if isinstance(config, ViTConfig) else ConvNeXt(config)
    _, info = build_network(scatter(network))
    return network, dataclasses.replace(info, **{"name": "mine", "licence": "none", **fields})


def tokens(features):
    return torch.cat([features.cls[:, None], features.registers, features.patches], 1)


@pytest.mark.parametrize("kind", list(SHAPES))
@torch.no_grad()
def test_three_libraries_open_the_folder(kind, scatter, tmp_path, record_property):
    network, info = made(SHAPES[kind], scatter)
    folder = export_backbone(network, info, tmp_path / "out")
    assert folder == tmp_path / "out"
    ours = load_backbone(folder)
    theirs: Any = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    other = transformers.AutoModel.from_pretrained(folder / "transformers").eval()
    for size in ((64, 96), (160, 32)):
        images = torch.randn(2, 3, *size)
        expected = network(images)
        assert torch.equal(tokens(ours(images)), tokens(expected))  # to the bit
        last = other(images).last_hidden_state
        differences = {"transformers": (last - tokens(expected)).abs().max().item()}
        if kind == "convnext":
            found = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
            differences["timm"] = (found - expected.cls).abs().max().item()
        else:
            found = theirs.forward_features(images)
            differences["timm"] = (found - tokens(expected)).abs().max().item()
            assert torch.allclose(theirs(images), expected.cls, atol=TOLERANCE)  # CLS is its output
        for library, difference in differences.items():
            record_property(f"{kind} {library} {size}", difference)
            print(f"export {kind}, {library}, {size}: max abs difference {difference:.2e}")
            assert difference < TOLERANCE


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("library", ["timm", "transformers"])
@torch.no_grad()
def test_their_folders_come_back_to_us(kind, library, scatter, tmp_path):
    network, info = made(SHAPES[kind], scatter, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    again = load_backbone(export_backbone(network, info, tmp_path / "out") / library)
    images = torch.randn(1, 3, 64, 96)
    assert torch.allclose(tokens(again(images)), tokens(network(images)), atol=TOLERANCE)
    assert again.info.family == info.family
    assert (again.info.mean, again.info.std) == (info.mean, info.std)


@pytest.mark.parametrize(
    ("changes", "timm_says", "transformers_says"),
    [
        ({"untie_cls_norm": True}, "norm of their own", "norm of their own"),
        ({"norm": "rmsnorm"}, "norms are rmsnorm", "norms are rmsnorm"),
        ({"rope_dtype": "bf16"}, "tables are bf16", "tables are bf16"),
        ({"rope_coordinates": "max"}, "'max'", "'max'"),
        (
            {"rope_base": None, "rope_min_period": 1.0, "rope_max_period": 9.0},
            "smallest to a largest",
            "smallest to a largest",
        ),
        ({"norm_eps": 1e-6}, "eps is 1e-06", None),
        ({"proj_bias": False}, "no proj_bias", None),
        ({"ffn_bias": False}, "no ffn_bias", None),
        ({"mask_k_bias": False}, "bias of its keys acts", None),
        ({"layerscale": None}, None, "no layerscale"),
    ],
)
@torch.no_grad()
def test_what_a_library_cannot_hold_is_said(
    changes, timm_says, transformers_says, scatter, tmp_path
):
    config = dataclasses.replace(SHAPES["mlp"], **changes)
    network, info = made(config, scatter)
    folder = export_backbone(network, info, tmp_path / "out")
    formats = json.loads((folder / "card.json").read_text())["formats"]
    images = torch.randn(1, 3, 32, 48)
    expected = tokens(network(images))
    assert torch.equal(tokens(load_backbone(folder)(images)), expected)
    for library, said in (("timm", timm_says), ("transformers", transformers_says)):
        assert formats[library]["written"] == (said is None)
        assert (folder / library).exists() == (said is None)
        if said:
            assert said in formats[library]["why_not"]
    if timm_says is None:
        theirs: Any = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
        assert torch.allclose(theirs.forward_features(images), expected, atol=TOLERANCE)
    if transformers_says is None:
        other = transformers.AutoModel.from_pretrained(folder / "transformers").eval()
        assert torch.allclose(other(images).last_hidden_state, expected, atol=TOLERANCE)


def test_rounded_periods_are_noted(scatter, tmp_path):
    network, info = made(SHAPES["mlp"], scatter)
    network.rope_embed.periods.copy_(network.rope_embed.periods.bfloat16().float())
    folder = export_backbone(network, info, tmp_path / "out")
    formats = json.loads((folder / "card.json").read_text())["formats"]
    for library in ("timm", "transformers"):
        assert "rounded to bfloat16" in formats[library]["note"]


def test_the_preprocessor_is_transformers_own(scatter, tmp_path):
    network, info = made(SHAPES["mlp"], scatter, size=64)
    folder = export_backbone(network, info, tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "transformers")
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    found = processor(image, return_tensors="pt")["pixel_values"]
    expected = (200 / 255 - torch.tensor(info.mean)) / torch.tensor(info.std)
    assert torch.allclose(found[0, :, 0, 0], expected, atol=1e-5)
    assert found.shape == (1, 3, 64, 64)

"""build_network and load_backbone: every kind of source, and every refusal."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from dino_adapters.backbones import VisionTransformer, ViTConfig, build_network, load_backbone
from dino_adapters.backbones.catalog import RELEASED, Released
from dino_adapters.backbones.convert import to_timm, to_transformers
from dino_adapters.backbones.convert_convnext import ours_to_official_convnext
from dino_adapters.backbones.convert_vit import ours_to_official_vit
from dino_adapters.contracts import (
    RGB,
    Band,
    RecipeError,
    UnknownNameError,
    WeightsError,
)
from dino_adapters.runtime.console import Notices

MICRO = ViTConfig(embed_dim=64, depth=2, num_heads=1, patch_size=8)
WEIGHTS_FOLDER = Path(os.environ.get("DINO_ADAPTERS_WEIGHTS", "../shared/weights"))
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def same(a, b):
    found, expected = a(IMAGES), b(IMAGES)
    return torch.equal(found.cls, expected.cls) and torch.equal(found.patches, expected.patches)


@pytest.fixture(scope="module")
def micro(scatter):
    network = scatter(VisionTransformer(MICRO))
    for block in network.blocks:
        block.attn.qkv.bias.data.chunk(3)[1].zero_()
    return network


class TestNames:
    def test_catalogue_is_random_by_seed_alone(self):
        state = torch.random.get_rng_state()
        first, info = build_network("vitmicro8", seed=1)
        again, _ = build_network("vitmicro8", seed=1)
        other, other_info = build_network("vitmicro8", seed=2)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
        assert not torch.equal(first.cls_token, other.cls_token)
        assert info.digest != other_info.digest
        assert (info.licence, info.family, info.patch_size) == ("none", "vit", 8)
        assert all(parameter.requires_grad for parameter in first.parameters())

    def test_timm_is_random_by_seed_alone(self):
        state = torch.random.get_rng_state()
        digests = [build_network("resnet10t", seed=seed)[1].digest for seed in (1, 1, 2)]
        assert torch.equal(torch.random.get_rng_state(), state)
        assert digests[0] == digests[1] != digests[2]

    @pytest.mark.parametrize(
        ("name", "near"),
        [("vits61", "vits16"), ("resnet81", "resnet18"), ("vit_smal_patch16_224", "vit_small")],
    )
    def test_unknown_names_have_a_nearest(self, name, near):
        with pytest.raises(UnknownNameError, match=f"no network called '{name}'.*{near}"):
            build_network(name)

    def test_unknown_tag_has_a_nearest(self):
        with pytest.raises(UnknownNameError, match=r"called 'a1_in2k'. Did you mean 'a1"):
            build_network("resnet18.a1_in2k")

    def test_changes_of_the_architecture(self):
        network, info = build_network("vitmicro8", architecture={"depth": 1, "registers": 0})
        assert (network.depth, info.registers) == (1, 0)
        network, _ = build_network(
            "vit_tiny_patch16_224", architecture={"depth": 2, "embed_dim": 48}
        )
        assert (network.depth, network.embed_dim) == (2, 48)
        with pytest.raises(RecipeError, match="is no DINOv3 network"):
            build_network("resnet10t", architecture=MICRO)

    def test_timms_dinov3_names_are_ours(self):
        changes = {"depth": 1, "embed_dim": 64, "num_heads": 2}
        network, info = build_network("timm/vit_small_patch16_dinov3", architecture=changes)
        assert isinstance(network, VisionTransformer)
        assert info.architecture["qkv_bias"] is False
        assert info.licence == "none"

    def test_drop_path_reaches_the_blocks(self):
        network, _ = build_network("vitmicro8", drop_path=0.25)
        assert {block.drop_path for block in network.blocks} == {0.25}

    def test_a_name_that_looks_like_a_path_is_one(self):
        for source in ("./nowhere", "model.safetensors", Path("vits16x")):
            with pytest.raises(WeightsError, match="no file or folder"):
                build_network(source)


class TestOfficialFiles:
    def test_flat_and_wrapped(self, micro, tmp_path):
        flat = ours_to_official_vit(micro.state_dict())
        torch.save(flat, tmp_path / "flat.pth")
        wrapped = {"teacher": {**{f"backbone.{k}": v for k, v in flat.items()}, "ibot_head.w": 1}}
        torch.save(wrapped, tmp_path / "wrapped.pth")
        for name in ("flat", "wrapped"):
            network, info = build_network(tmp_path / f"{name}.pth")
            assert same(network, micro)
            assert info.architecture["num_heads"] == 1
            assert info.licence == "unknown"
        named, _ = build_network("vitmicro8", architecture=MICRO, checkpoint=tmp_path / "flat.pth")
        assert same(named, micro)

    def test_a_whole_config_replaces_what_is_inferred(self, micro, tmp_path):
        torch.save(ours_to_official_vit(micro.state_dict()), tmp_path / "a.pth")
        config = ViTConfig(embed_dim=64, depth=2, num_heads=1, patch_size=8, norm_eps=1e-2)
        network, _ = build_network(tmp_path / "a.pth", architecture=config)
        assert not same(network, micro)
        assert network.config.norm_eps == 1e-2
        with pytest.raises(RecipeError, match="the file holds a vit"):
            build_network(tmp_path / "a.pth", architecture=build_cnx()[1])

    def test_convnext(self, tmp_path, scatter):
        network, _ = build_cnx()
        scatter(network)
        torch.save(ours_to_official_convnext(network.state_dict()), tmp_path / "c.pth")
        again, info = build_network(tmp_path / "c.pth")
        assert info.family == "convnext"
        images = torch.randn(1, 3, 32, 64)
        assert torch.equal(again(images).patches, network(images).patches)

    def test_digits_in_the_name_bring_licence_and_statistics(self, micro, tmp_path):
        path = tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
        torch.save(ours_to_official_vit(micro.state_dict()), path)
        notices = Notices()
        _, info = build_network(path, notices=notices)
        assert info.licence == "dinov3-license"
        assert info.mean == (0.430, 0.411, 0.296)
        assert sum("DINOv3 License" in line for line in notices.summary()) == 1

    def test_content_is_recognised_under_another_name(self, micro, tmp_path, monkeypatch):
        path = tmp_path / "renamed.pth"
        torch.save(ours_to_official_vit(micro.state_dict()), path)
        digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        monkeypatch.setitem(RELEASED, digits, Released("vits16"))
        assert build_network(path)[1].licence == "dinov3-license"

    def test_norm_for_local_crops_follows_the_file(self, tmp_path):
        config = ViTConfig(
            embed_dim=64, depth=1, num_heads=1, patch_size=8, untie_local_cls_norm=True
        )
        torch.save(VisionTransformer(config).state_dict(), tmp_path / "a.pth")
        changes = {"embed_dim": 64, "depth": 1, "num_heads": 1}
        network, _ = build_network("vitmicro8", architecture=changes, checkpoint=tmp_path / "a.pth")
        assert network.local_cls_norm is not None


def build_cnx():
    changes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    network, _ = build_network("cnx_tiny", architecture=changes)
    return network, network.config


class TestFoldersOfLibraries:
    def test_transformers_in_parts(self, micro, tmp_path):
        tensors = to_transformers(micro.state_dict(), "vit")
        half = dict(list(tensors.items())[::2])
        rest = {k: v for k, v in tensors.items() if k not in half}
        save_file(half, tmp_path / "model-1.safetensors")
        save_file(rest, tmp_path / "model-2.safetensors")
        index = {k: f"model-{1 if k in half else 2}.safetensors" for k in tensors}
        facts = {"model_type": "dinov3_vit", "num_attention_heads": 1}
        (tmp_path / "config.json").write_text(json.dumps(facts))
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        network, info = build_network(tmp_path)
        assert same(network, micro)
        assert info.licence == "unknown"
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"no file .*model-2"):
            build_network(tmp_path)

    def test_metas_folder_names_carry_the_licence(self, micro, tmp_path):
        folder = tmp_path / "models--facebook--dinov3-vits16-pretrain-lvd1689m"
        folder.mkdir()
        save_file(to_transformers(micro.state_dict(), "vit"), folder / "model.safetensors")
        facts = {"model_type": "dinov3_vit", "num_attention_heads": 1}
        (folder / "config.json").write_text(json.dumps(facts))
        assert build_network(folder)[1].licence == "dinov3-license"

    def test_options_that_ours_lack_are_refused(self, micro, tmp_path):
        save_file(to_transformers(micro.state_dict(), "vit"), tmp_path / "model.safetensors")
        for facts, match in (
            ({"model_type": "dinov3_vit", "hidden_act": "relu"}, "hidden_act 'relu'"),
            ({"model_type": "bert"}, "model_type 'bert'"),
        ):
            (tmp_path / "config.json").write_text(json.dumps(facts))
            with pytest.raises(WeightsError, match=match):
                build_network(tmp_path)

    def test_checkpoint_of_timm_for_timms_name(self, micro, tmp_path):
        config = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8}
        save_file(to_timm(micro.state_dict(), "vit"), tmp_path / "a.safetensors")
        network, info = build_network(
            "vit_small_patch16_dinov3_qkvb.lvd1689m",
            architecture=config,
            checkpoint=tmp_path / "a.safetensors",
        )
        assert same(network, micro)
        assert info.licence == "dinov3-license"  # the tag says so

    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_checkpoint_of_a_cnn_with_classifier(self, suffix, tmp_path):
        theirs: Any = timm.create_model("resnet10t", num_classes=7).eval()
        path = tmp_path / f"a.{suffix}"
        save_file(theirs.state_dict(), path) if suffix == "safetensors" else torch.save(
            theirs.state_dict(), path
        )
        network, info = build_network("resnet10t", checkpoint=path)
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
            assert torch.equal(network(images).cls, expected)
        assert info.training == {"weights": path.name}
        save_file({"conv1.0.weight": torch.ones(1)}, tmp_path / "b.safetensors")
        with pytest.raises(WeightsError, match=r"missing .* tensors"):
            build_network("resnet10t", checkpoint=tmp_path / "b.safetensors")


class TestModules:
    def test_modules_are_copied(self, micro):
        network, info = build_network(micro)
        assert same(network, micro)
        network.cls_token.data.zero_()
        assert micro.cls_token.any()
        assert info.name == "module"
        theirs = timm.create_model("resnet10t", num_classes=0).eval()
        network, _ = build_network(theirs)
        next(network.parameters()).data.zero_()
        assert next(theirs.parameters()).any()

    def test_a_module_of_nobody_is_refused(self):
        with pytest.raises(WeightsError, match="Linear has no forward_intermediates"):
            build_network(torch.nn.Linear(2, 2))


class TestBands:
    NIR = Band("nir", "reflectance", 842.0, 0.0, 1.0)

    def test_random_networks_read_any_bands(self):
        for name in ("vitmicro8", "resnet10t"):
            network, info = build_network(name, bands=(*RGB, self.NIR))
            assert network(torch.randn(1, 4, 64, 64)).cls.shape == (1, network.embed_dim)
            assert info.untrained_bands == ()
            assert info.mean == (0.485, 0.456, 0.406, 0.5)
            assert info.std == (0.229, 0.224, 0.225, 0.25)

    def test_bands_need_ranges(self):
        with pytest.raises(RecipeError, match="a name alone says nothing"):
            build_network("vitmicro8", bands=("red", "nir"))  # pyright: ignore[reportArgumentType]

    def test_weights_of_other_bands_need_names(self, tmp_path):
        network, _ = build_network("vitmicro8", bands=(*RGB, self.NIR))
        save_file(network.state_dict(), tmp_path / "a.safetensors")
        with pytest.raises(RecipeError, match="read 4 channels, and nothing says which"):
            build_network(tmp_path / "a.safetensors")
        again, info = build_network(tmp_path / "a.safetensors", bands=(*RGB, self.NIR))
        assert torch.equal(again.patch_embed.proj.weight, network.patch_embed.proj.weight)
        assert info.untrained_bands == ()

    @pytest.mark.parametrize("kind", ["ours", "timm"])
    def test_spread_bands_are_noted_and_reported_when_frozen(self, kind, micro, caplog):
        source = micro if kind == "ours" else timm.create_model("resnet10t", num_classes=0)
        with caplog.at_level(logging.WARNING, logger="dino_adapters"):
            _, info = build_network(source, bands=(*RGB, self.NIR))
            assert info.untrained_bands == ("nir",)
            assert "16 of 17" not in caplog.text
            backbone = load_backbone(source, bands=(*RGB, self.NIR))
        assert backbone.info.untrained_bands == ("nir",)
        assert caplog.text.count("16 of 17 published comparisons") == 1
        assert "mean -3.9 points, worst -21.1" in caplog.text
        backbone(torch.randn(1, 4, 32, 32))

    def test_other_order_is_no_spreading(self, micro):
        network, info = build_network(micro, bands=RGB[::-1])
        assert info.untrained_bands == ()
        assert info.mean == (0.406, 0.456, 0.485)
        with torch.no_grad():
            found = network(IMAGES.flip(1)).cls
            assert torch.allclose(found, micro(IMAGES).cls, atol=1e-5)


def test_the_hub_is_asked_only_when_told(monkeypatch):
    asked = []
    real = timm.create_model

    def create(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        if pretrained:
            raise OSError("no connection")
        return real(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    build_network("resnet10t.c3_in1k")
    assert not any(pretrained for _, pretrained in asked)
    with pytest.raises(WeightsError, match=r"'resnet10t\.c3_in1k' could not be fetched"):
        build_network("hub:timm/resnet10t.c3_in1k")
    assert asked[-1] == ("resnet10t.c3_in1k", True)


@pytest.mark.parametrize("name", ["resnet10t", "vit_small_patch16_dinov3"])
def test_what_the_hub_gives_is_taken(name, monkeypatch):
    real = timm.create_model
    small: dict[str, Any] = (
        {"depth": 1, "embed_dim": 64, "num_heads": 1} if name.startswith("vit") else {}
    )
    monkeypatch.setattr(
        timm, "create_model", lambda n, pretrained=False, **k: real(n, **k, **small)
    )
    network, info = build_network(f"hub:{name}")
    assert info.training == {"weights": f"hub:{name}"}
    assert info.licence == ("dinov3-license" if small else "apache-2.0")
    assert isinstance(network, VisionTransformer) == bool(small)

"""Export folders: opened by us, by timm and by transformers with equal outputs."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import resource
import stat
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

from dino_adapters.backbones import (
    ConvNeXt,
    ConvNeXtConfig,
    TimmNetwork,
    VisionTransformer,
    ViTConfig,
    build_network,
    digest_of,
    export_backbone,
    load_backbone,
    save,
)
from dino_adapters.backbones.card import read_card
from dino_adapters.contracts import (
    RGB,
    BackboneInfo,
    Band,
    DiskFullError,
    RunFolderError,
    WeightsError,
)

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


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "convnext"])
def test_round_trip_of_everything_known(kind, scatter, tmp_path):
    network, info = made(
        SHAPES[kind], scatter, size=96, training={"steps": 5, "nested": {"a": [1, 2]}}
    )
    folder = export_backbone(network, info, tmp_path / "a")
    again, back = build_network(folder)
    assert back == dataclasses.replace(info, digest=back.digest)
    assert back.digest == read_card(folder).digest == digest_of(network, back)
    second = export_backbone(again, back, tmp_path / "b")
    assert (second / "card.json").read_bytes() == (folder / "card.json").read_bytes()
    assert load_backbone(folder / "model.safetensors").info == back


def test_digest_sees_what_changes_vectors_and_nothing_else(scatter):
    network, info = made(SHAPES["mlp"], scatter)
    digest = digest_of(network, info)
    same = dataclasses.replace(info, name="b", licence="x", training={"a": 1}, size=8, digest="y")
    assert digest_of(network, same) == digest
    for change in (
        {"mean": (0.1, 0.2, 0.3)},
        {"std": (0.1, 0.2, 0.3)},
        {"bands": RGB[::-1]},
        {"architecture": {**info.architecture, "norm_eps": 1e-6}},
    ):
        assert digest_of(network, dataclasses.replace(info, **change)) != digest
    with torch.no_grad():
        network.norm.bias[3] += 1e-3
    assert digest_of(network, info) != digest


def test_card_is_complete_and_public(scatter, tmp_path):
    network, info = made(SHAPES["mlp"], scatter, licence="dinov3-license")
    folder = export_backbone(network, info, tmp_path / "out")
    card = json.loads((folder / "card.json").read_text())
    assert card["format"] == "dino-adapters-backbone"
    assert card["formats"]["timm"]["written"] is True
    assert "DINOv3 License" in card["licence_note"]
    assert "DINOv3 License" in (folder / "LICENCE-NOTE.txt").read_text()
    assert json.loads((folder / "timm/config.json").read_text())["pretrained_cfg"]["license"] == (
        "dinov3-license"
    )
    for library in ("timm", "transformers"):  # the licence travels with each part
        assert load_backbone(folder / library).info.licence == "dinov3-license"
    assert str(tmp_path) not in (folder / "card.json").read_text()
    network, info = made(SHAPES["mlp"], scatter)
    plain = export_backbone(network, info, tmp_path / "plain")
    assert "licence_note" not in json.loads((plain / "card.json").read_text())
    assert not (plain / "LICENCE-NOTE.txt").exists()
    assert stat.S_IMODE(plain.stat().st_mode) & 0o500 == 0o500


@torch.no_grad()
def test_many_bands(scatter, tmp_path, caplog):
    source, _ = made(SHAPES["mlp"], scatter)
    bands = (*RGB, NIR)
    network, info = build_network(source, bands=bands, mean=(0.1,) * 4, std=(0.2,) * 4)
    with caplog.at_level(logging.WARNING, logger="dino_adapters"):
        folder = export_backbone(network, info, tmp_path / "out")
    assert caplog.text.count("16 of 17") == 1
    caplog.clear()
    images = torch.randn(1, 4, 32, 48)
    with caplog.at_level(logging.WARNING, logger="dino_adapters"):
        again = load_backbone(folder)
    assert "16 of 17" in caplog.text
    assert again.info.bands == bands
    assert again.info.untrained_bands == ("nir",)
    assert torch.equal(again(images).cls, network(images).cls)
    formats = json.loads((folder / "card.json").read_text())["formats"]
    assert "No preprocessor" in formats["transformers"]["note"]
    assert not (folder / "transformers/preprocessor_config.json").exists()
    theirs: Any = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    assert torch.allclose(theirs(images), network(images).cls, atol=TOLERANCE)
    other = transformers.AutoModel.from_pretrained(folder / "transformers").eval()
    found = other(images).last_hidden_state
    assert torch.allclose(found, tokens(network(images)), atol=TOLERANCE)
    trained = dataclasses.replace(info, untrained_bands=())
    caplog.clear()
    export_backbone(network, trained, tmp_path / "trained")
    assert "16 of 17" not in caplog.text


class TestForeign:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("resnet10t", {}),
            ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "img_size": 96}),
        ],
    )
    @torch.no_grad()
    def test_round_trip(self, name, arguments, tmp_path):
        network, info = build_network(name, architecture=arguments, seed=3)
        folder = export_backbone(network, info, tmp_path / "out")
        again = load_backbone(folder)
        images = torch.randn(2, 3, 64, 96)
        assert torch.equal(again(images).cls, network(images).cls)
        assert torch.equal(again(images).patches, network(images).patches)
        assert again.info == dataclasses.replace(info, digest=again.info.digest)
        assert again.info.digest == info.digest
        theirs: Any = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
        own = network.model
        assert torch.equal(theirs.forward_features(images), own.forward_features(images))
        from_timm = load_backbone(folder / "timm")
        assert torch.equal(from_timm(images).cls, network(images).cls)
        formats = json.loads((folder / "card.json").read_text())["formats"]
        assert formats["transformers"]["written"] is False

    @torch.no_grad()
    def test_many_bands(self, tmp_path):
        network, info = build_network("demo:efficientnet_lite0", bands=(*RGB, NIR))
        folder = export_backbone(network, info, tmp_path / "out")
        images = torch.randn(1, 4, 64, 64)
        assert torch.equal(load_backbone(folder)(images).cls, network(images).cls)
        theirs: Any = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
        assert torch.equal(theirs(images), network(images).cls)
        assert read_card(folder).licence == "Apache-2.0"

    def test_a_name_that_does_not_rebuild_is_refused(self, tmp_path):
        module = timm.create_model("resnet10t", num_classes=0, in_chans=5)
        network = TimmNetwork(module, name="resnet10t")
        _, info = build_network("resnet10t")
        with pytest.raises(WeightsError, match="is not this network"):
            export_backbone(network, info, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestFolder:
    def test_existing_folders(self, scatter, tmp_path):
        network, info = made(SHAPES["nobias"], scatter)
        folder = tmp_path / "deep" / "out"
        folder.mkdir(parents=True)  # an empty one is as good as none
        export_backbone(network, info, folder)
        (folder / "extra").write_text("old")
        with pytest.raises(RunFolderError, match="exists already"):
            export_backbone(network, info, folder)
        scatter(network, seed=8)
        export_backbone(network, info, folder, overwrite=True)
        assert not (folder / "extra").exists()
        assert load_backbone(folder).info.digest == digest_of(network, info)
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    def test_strangers_files_are_left_alone(self, scatter, tmp_path):
        network, info = made(SHAPES["nobias"], scatter)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(RunFolderError, match="holds files but no exported backbone"):
            export_backbone(network, info, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize("fails_at", [0, 1, 2])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
    def test_a_failure_leaves_the_old_export(
        self, fails_at, number, scatter, tmp_path, monkeypatch
    ):
        network, info = made(SHAPES["nobias"], scatter)
        folder = export_backbone(network, info, tmp_path / "out")
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        calls = iter(range(9))
        real = save.write_tensors

        def full(path, *args):
            if next(calls) == fails_at:
                path.write_bytes(b"half")
                raise OSError(number, os.strerror(number))
            real(path, *args)

        monkeypatch.setattr(save, "write_tensors", full)
        expected = DiskFullError if number == errno.ENOSPC else PermissionError
        with pytest.raises(expected, match=os.strerror(number)):
            export_backbone(scatter(network, seed=4), info, folder, overwrite=True)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert list(tmp_path.iterdir()) == [folder]

    @pytest.mark.parametrize("limit", [100, 20_000, 300_000])
    def test_a_file_that_may_not_grow_is_a_full_disk(self, limit, scatter, tmp_path):
        network, info = made(SHAPES["nobias"], scatter)
        folder = export_backbone(network, info, tmp_path / "out")
        assert (folder / "model.safetensors").stat().st_size > 300_000
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DiskFullError) as told:
                export_backbone(scatter(network, seed=4), info, folder, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = str(told.value)
        assert said.startswith(f"The export {folder} could not be written (File too large).")
        assert "MB are free" in said
        assert "--resume" in said
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert list(tmp_path.iterdir()) == [folder]

    def test_other_dtypes_become_float32(self, scatter, tmp_path):
        network, info = made(SHAPES["nobias"], scatter)
        folder = export_backbone(network.bfloat16(), info, tmp_path / "out")
        assert network.cls_token.dtype == torch.bfloat16
        stored = load_file(folder / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.float32}
        assert load_backbone(folder).info.digest == read_card(folder).digest

    def test_a_network_of_nobody_is_refused(self, scatter, tmp_path):
        _, info = made(SHAPES["nobias"], scatter)
        with pytest.raises(WeightsError, match="A Linear cannot be exported"):
            export_backbone(torch.nn.Linear(1, 1), info, tmp_path / "out")

    def test_damaged_cards(self, scatter, tmp_path):
        network, info = made(SHAPES["nobias"], scatter)
        folder = export_backbone(network, info, tmp_path / "out")
        card = json.loads((folder / "card.json").read_text())
        for change, match in (
            ({"format": "x"}, "no card of a backbone"),
            ({"format_version": 99}, "has version 99"),
            ({"info": {}}, "lacks or misnames a field"),
        ):
            (folder / "card.json").write_text(json.dumps({**card, **change}))
            with pytest.raises(WeightsError, match=match):
                load_backbone(folder)
        (folder / "card.json").write_text("{")
        with pytest.raises(WeightsError, match="cannot be read"):
            load_backbone(folder)

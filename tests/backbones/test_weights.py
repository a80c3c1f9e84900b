"""Weight files that hold code, are damaged, or belong to something else."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dino_adapters.backbones import VisionTransformer, ViTConfig, build_network
from dino_adapters.contracts import (
    RecipeError,
    WeightsError,
)

MICRO = ViTConfig(embed_dim=64, depth=2, num_heads=1, patch_size=8)


@pytest.fixture(scope="module")
def micro(scatter):
    network = scatter(VisionTransformer(MICRO))
    for block in network.blocks:
        block.attn.qkv.bias.data.chunk(3)[1].zero_()
    return network


def build_cnx():
    changes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    network, _ = build_network("cnx_tiny", architecture=changes)
    return network, network.config


class Malice:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


class TestDamage:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
    def test_code_in_a_pickle_is_refused_and_not_run(self, suffix, tmp_path):
        proof = tmp_path / "ran"
        torch.save({"cls_token": Malice(proof)}, tmp_path / f"bad{suffix}")
        with pytest.raises(WeightsError, match="could run code; it was not read"):
            build_network(tmp_path / f"bad{suffix}")
        assert not proof.exists()
        # The file is really malicious: whoever unpickles it runs the code.
        torch.load(tmp_path / f"bad{suffix}", weights_only=False)
        assert proof.exists()

    def test_code_in_a_plain_pickle_is_refused_and_not_run(self, tmp_path):
        proof = tmp_path / "ran"
        (tmp_path / "bad.pth").write_bytes(pickle.dumps(Malice(proof)))
        with pytest.raises(WeightsError, match=r"code|damaged"):
            build_network(tmp_path / "bad.pth")
        assert not proof.exists()

    def test_cut_and_spoilt_safetensors(self, micro, tmp_path):
        save_file(dict(micro.state_dict()), tmp_path / "a.safetensors")
        whole = (tmp_path / "a.safetensors").read_bytes()
        for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut.safetensors").write_bytes(whole[:size])
            with pytest.raises(WeightsError, match="damaged or no safetensors"):
                build_network(tmp_path / "cut.safetensors")

    def test_cut_and_random_pickles(self, micro, tmp_path):
        torch.save(micro.state_dict(), tmp_path / "a.pth")
        whole = (tmp_path / "a.pth").read_bytes()
        noise = random.Random(0).randbytes(1000)
        for content in (b"", whole[:100], whole[: len(whole) // 2], noise, b"hello"):
            (tmp_path / "cut.pth").write_bytes(content)
            with pytest.raises(WeightsError):
                build_network(tmp_path / "cut.pth")

    def test_partly_matching_checkpoint_names_the_tensors(self, micro, tmp_path):
        state = dict(micro.state_dict())
        del state["blocks.1.norm2.bias"]
        state["blocks.1.norm2.shift"] = torch.zeros(64)
        state["norm.weight"] = torch.ones(32)
        save_file(state, tmp_path / "part.safetensors")
        with pytest.raises(WeightsError) as caught:
            build_network(tmp_path / "part.safetensors")
        said = str(caught.value)
        assert "missing 1 tensor (blocks.1.norm2.bias)" in said
        assert "unexpected 1 tensor (blocks.1.norm2.shift)" in said
        assert "norm.weight: (32,) instead of (64,)" in said

    def test_other_networks_are_refused(self, tmp_path):
        save_file({"fc.weight": torch.ones(2)}, tmp_path / "fc.safetensors")
        with pytest.raises(WeightsError, match=r"no DINOv3 network \(fc.weight"):
            build_network(tmp_path / "fc.safetensors")
        with pytest.raises(WeightsError, match=r"holds no DINOv3 \(fc.weight"):
            build_network("vitmicro8", checkpoint=tmp_path / "fc.safetensors")
        save_file(build_cnx()[0].state_dict(), tmp_path / "cnx.safetensors")
        with pytest.raises(WeightsError, match="holds a convnext, and 'vitmicro8' is a vit"):
            build_network("vitmicro8", checkpoint=tmp_path / "cnx.safetensors")
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(WeightsError, match="holds a list"):
            build_network(tmp_path / "list.pth")

    def test_a_checkpoint_goes_with_a_name_only(self, micro, tmp_path):
        save_file(dict(micro.state_dict()), tmp_path / "a.safetensors")
        for source in (tmp_path / "a.safetensors", micro, "demo:efficientnet_lite0"):
            with pytest.raises(RecipeError, match="weights of its own"):
                build_network(source, checkpoint=tmp_path / "a.safetensors")

    def test_folders_of_nothing(self, tmp_path):
        with pytest.raises(WeightsError, match=r"neither card\.json nor config\.json"):
            build_network(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(WeightsError, match="no model_type and no architecture"):
            build_network(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(WeightsError, match="cannot be read"):
            build_network(tmp_path)

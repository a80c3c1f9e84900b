"""Architectures read off the tensors of a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.backbones import ConvNeXt, ConvNeXtConfig, VisionTransformer, ViTConfig
from dino_adapters.backbones.catalog import CATALOG
from dino_adapters.backbones.infer import adjust, config_from, infer_convnext, infer_vit
from dino_adapters.contracts import RecipeError, WeightsError

TINY: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 2}
CNX: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 40)}


@pytest.mark.parametrize("name", ["vits16", "vits16plus", "vitl16", "vith16plus", "vit7b16"])
def test_published_sizes_are_inferred(name):
    config: Any = CATALOG[name]
    with torch.device("meta"):
        state = VisionTransformer(config).state_dict()
    state.pop("rope_embed.periods")  # heads follow from the width alone
    for key in [key for key in state if key.endswith(("bias", "bias_mask"))]:
        state[key] = torch.zeros(state[key].shape)
    found = infer_vit(state)
    assert found == adjust(config, {"swiglu_align": found.swiglu_align})


@given(
    dim=st.sampled_from([32, 48, 96]),
    hidden=st.integers(8, 300),
    gated=st.booleans(),
    depth=st.integers(1, 3),
    registers=st.integers(0, 5),
    patch=st.sampled_from([4, 8]),
    flags=st.tuples(*[st.booleans()] * 5),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_vit_is_inferred(dim, hidden, gated, depth, registers, patch, flags):
    config = ViTConfig(
        embed_dim=dim,
        depth=depth,
        num_heads=2,
        patch_size=patch,
        registers=registers,
        ffn="swiglu" if gated else "mlp",
        ffn_ratio=(hidden + 0.5) / dim,
        swiglu_align=1,
        qkv_bias=flags[0],
        proj_bias=flags[1],
        ffn_bias=flags[2],
        norm="rmsnorm" if flags[3] else "layernorm",
        untie_cls_norm=flags[4],
        layerscale=None if flags[0] else 1e-5,
    )
    state = VisionTransformer(config).state_dict()
    again = VisionTransformer(infer_vit(state)).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def test_convnext_is_inferred():
    config = ConvNeXtConfig(**CNX, in_channels=5, layerscale=None)
    assert infer_convnext(ConvNeXt(config).state_dict()) == config


def test_bfloat16_periods_still_mean_base_100():
    state = VisionTransformer(ViTConfig(embed_dim=128, depth=1, num_heads=2)).state_dict()
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16().float()
    assert infer_vit(state).rope_base == 100.0
    config = ViTConfig(embed_dim=128, depth=1, num_heads=2, rope_base=1000.0)
    assert infer_vit(VisionTransformer(config).state_dict()).rope_base == pytest.approx(1000.0)


def test_a_width_that_tells_no_heads_asks_for_them():
    state = VisionTransformer(ViTConfig(embed_dim=96, depth=1, num_heads=3)).state_dict()
    assert infer_vit(state).num_heads == 3  # from the periods
    state.pop("rope_embed.periods")
    with pytest.raises(WeightsError, match=r"architecture=\{'num_heads'"):
        infer_vit(state)
    assert infer_vit(state, {"num_heads": 3}).num_heads == 3


def test_unknown_fields_name_the_nearest():
    with pytest.raises(RecipeError, match=r"no field 'head_count'|Did you mean"):
        adjust(ViTConfig(**TINY), {"num_head": 3})
    with pytest.raises(RecipeError, match="no field 'colour'"):
        config_from(ViTConfig, {**TINY, "colour": 1})
    with pytest.raises(RecipeError, match="incomplete"):
        config_from(ViTConfig, {"depth": 1})
    with pytest.raises(RecipeError, match="architecture is a ConvNeXtConfig"):
        adjust(ViTConfig(**TINY), ConvNeXtConfig())

"""Ours against timm and transformers with the same random weights, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers

from dino_adapters.backbones import VisionTransformer, ViTConfig, build_network
from dino_adapters.backbones.config import ConvNeXtConfig
from dino_adapters.backbones.convert import (
    fit,
    recognise,
    settle_biases,
    strip_wrappers,
    to_ours,
    to_timm,
    to_transformers,
)
from dino_adapters.backbones.convert_convnext import (
    official_convnext_to_ours,
    ours_to_official_convnext,
)
from dino_adapters.backbones.convert_vit import official_vit_to_ours, ours_to_official_vit
from dino_adapters.backbones.convnext import ConvNeXt
from dino_adapters.contracts import WeightsError
from dino_adapters.runtime.console import Notices

TINY: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 2}
TIMM_VITS = {
    "plain": "vit_small_patch16_dinov3",
    "qkvb": "vit_small_patch16_dinov3_qkvb",
    "swiglu": "vit_small_plus_patch16_dinov3",
    "swiglu_qkvb": "vit_small_plus_patch16_dinov3_qkvb",
}
CNX: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 40)}
TOLERANCE = 1e-5  # fp32, values up to 5; measured: 0 for timm, 2e-6 for transformers


def tokens(features):
    return torch.cat([features.cls[:, None], features.registers, features.patches], 1)


def worst(a, b, record, what):
    found = (a - b).abs().max().item()
    record(what, found)
    print(f"{what}: max abs difference {found:.2e} (values up to {b.abs().max():.1f})")
    assert b.std() > 0.3  # a comparison of constants would prove nothing
    return found


def timm_vit(kind, scatter) -> Any:
    return scatter(timm.create_model(TIMM_VITS[kind], num_classes=0, **TINY))


def timm_convnext(scatter) -> Any:
    return scatter(timm.create_model("convnext_tiny.dinov3_lvd1689m", num_classes=0, **CNX))


def hf_vit(scatter, *, gated=False, qkv_bias=True, key_bias=False):
    return scatter(
        transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=168 if gated else 256,
                num_register_tokens=4,
                use_gated_mlp=gated,
                hidden_act="silu" if gated else "gelu",
                query_bias=qkv_bias,
                value_bias=qkv_bias,
                key_bias=key_bias,
            )
        )
    )


def hf_convnext(scatter):
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[16, 24, 32, 40], depths=[1, 2, 1, 1])
    return scatter(transformers.DINOv3ConvNextModel(config))


@pytest.mark.parametrize("kind", list(TIMM_VITS))
@torch.no_grad()
def test_import_of_timms_vit_gives_its_outputs(kind, scatter, images, record_property):
    theirs = timm_vit(kind, scatter)
    ours, info = build_network(theirs)
    assert isinstance(ours, VisionTransformer)
    assert info.architecture["qkv_bias"] == ("qkvb" in kind)
    assert info.architecture["ffn"] == ("swiglu" if "swiglu" in kind else "mlp")
    expected = theirs.forward_features(images)
    assert worst(tokens(ours(images)), expected, record_property, f"timm {kind}") < TOLERANCE


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("biases", ["none", "qv", "qkv"])
@torch.no_grad()
def test_import_of_transformers_vit_gives_its_outputs(
    gated, biases, scatter, images, record_property
):
    theirs = hf_vit(scatter, gated=gated, qkv_bias=biases != "none", key_bias=biases == "qkv")
    ours, info = build_network(theirs)
    assert info.architecture["mask_k_bias"] == (biases != "qkv")
    expected = theirs(images).last_hidden_state
    what = f"transformers {'swiglu' if gated else 'mlp'} {biases}"
    assert worst(tokens(ours(images)), expected, record_property, what) < TOLERANCE


@torch.no_grad()
def test_import_of_convnexts_gives_their_outputs(scatter, record_property):
    for size in ((64, 96), (160, 32)):
        images = torch.randn(2, 3, *size)
        theirs = timm_convnext(scatter)
        ours, _ = build_network(theirs)
        assert isinstance(ours, ConvNeXt)
        map_ = theirs.forward_features(images)
        raw = ours(images, norm=False).patches
        assert worst(raw, map_.flatten(2).mT, record_property, f"timm convnext {size}") < TOLERANCE
        pooled = theirs.forward_head(map_, pre_logits=True)
        assert worst(ours(images).cls, pooled, record_property, "pooled") < TOLERANCE

        theirs = hf_convnext(scatter)
        ours, _ = build_network(theirs)
        expected = theirs(images).last_hidden_state
        what = f"transformers convnext {size}"
        assert worst(tokens(ours(images)), expected, record_property, what) < TOLERANCE


@pytest.mark.parametrize("kind", list(TIMM_VITS))
@torch.no_grad()
def test_export_to_timms_names_gives_our_outputs(kind, scatter, images, record_property):
    theirs: Any = timm.create_model(TIMM_VITS[kind], num_classes=0, **TINY).eval()
    ours, _ = build_network(theirs)
    scatter(ours, seed=3)
    theirs.load_state_dict(to_timm(ours.state_dict(), "vit"), strict=True)
    found = theirs.forward_features(images)
    assert worst(found, tokens(ours(images)), record_property, f"to timm {kind}") < TOLERANCE


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
@torch.no_grad()
def test_export_to_transformers_names_gives_our_outputs(gated, scatter, images, record_property):
    theirs = hf_vit(scatter, gated=gated)
    ours, _ = build_network(theirs)
    scatter(ours, seed=3)
    made = to_transformers(ours.state_dict(), "vit")
    # Files have `layer.N`; the module in memory has `model.layer.N`.
    memory = {f"model.{k}" if k.startswith("layer.") else k: v for k, v in made.items()}
    theirs.load_state_dict(memory, strict=True)
    found = theirs(images).last_hidden_state
    assert worst(found, tokens(ours(images)), record_property, "to transformers") < TOLERANCE


@torch.no_grad()
def test_export_of_convnext_gives_our_outputs(scatter, record_property):
    images = torch.randn(2, 3, 64, 96)
    theirs = timm_convnext(scatter)
    ours, _ = build_network(theirs)
    scatter(ours, seed=3)
    theirs.load_state_dict(to_timm(ours.state_dict(), "convnext"), strict=True)
    found = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    assert worst(found, ours(images).cls, record_property, "to timm convnext") < TOLERANCE
    theirs = hf_convnext(scatter)
    made = to_transformers(ours.state_dict(), "convnext")
    memory = {f"model.{k}" if k.startswith("stages.") else k: v for k, v in made.items()}
    theirs.load_state_dict(memory, strict=True)
    found = theirs(images).last_hidden_state
    assert worst(found, tokens(ours(images)), record_property, "to hf convnext") < TOLERANCE


@pytest.mark.parametrize("layout", ["timm", "transformers", "official"])
@pytest.mark.parametrize("source", ["vit", "vit_swiglu", "vit_nobias", "convnext"])
def test_there_and_back_is_the_same_tensors(layout, source, scatter):
    if source == "convnext":
        network = scatter(ConvNeXt(ConvNeXtConfig(**CNX)))
    else:
        ffn = "swiglu" if source == "vit_swiglu" else "mlp"
        config = ViTConfig(**TINY, ffn=ffn, qkv_bias=source != "vit_nobias")
        network = scatter(VisionTransformer(config))
    family: Any = source.partition("_")[0]
    state = dict(network.state_dict())
    for name in state:  # what a masked key's bias holds cannot survive: nobody can see it
        if name.endswith("attn.qkv.bias"):
            state[name] = state[name] * state[f"{name}_mask"]
    if layout == "official":
        there = ours_to_official_vit(state) if family == "vit" else ours_to_official_convnext(state)
        lost = set()
    else:
        there = (to_timm if layout == "timm" else to_transformers)(state, family)
        lost = {"mask_token"} if layout == "timm" else set()
        lost |= {"rope_embed.periods"}
    assert recognise(there) == (layout, family)
    back = to_ours(there, (layout, family))
    kept = {name for name in state if name not in lost}
    assert kept <= set(back) <= set(state)
    for name in kept:
        assert torch.equal(back[name], state[name]), name
    if layout == "timm" and family == "vit":
        assert not back["mask_token"].any()


def test_both_prefixes_of_transformers_are_read(scatter):
    state = hf_vit(scatter).state_dict()
    assert any(name.startswith("model.layer.") for name in state)
    short = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    long_, brief = (to_ours(s, ("transformers", "vit")) for s in (state, short))
    assert long_.keys() == brief.keys()
    assert all(torch.equal(long_[name], brief[name]) for name in long_)


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_a_tensor_without_place_is_named(layout, scatter):
    state = {**(timm_vit("plain", scatter) if layout == "timm" else hf_vit(scatter)).state_dict()}
    state["decoder.weight"] = torch.zeros(2)
    with pytest.raises(WeightsError, match=r"1 tensor \(decoder\.weight\)"):
        to_ours(state, (layout, "vit"))


def test_an_incomplete_projection_is_named(scatter):
    state = dict(hf_vit(scatter).state_dict())
    del state["model.layer.1.attention.k_proj.weight"]
    with pytest.raises(WeightsError, match=r"Layer 1 lacks k_proj\.weight"):
        to_ours(state, ("transformers", "vit"))


def test_timm_refuses_a_key_bias_that_acts():
    network = VisionTransformer(ViTConfig(**TINY, mask_k_bias=False))
    state = dict(network.state_dict())
    state["blocks.1.attn.qkv.bias"] = torch.ones(192)
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.qkv\.bias \(of the key\)"):
        to_timm(state, "vit")
    network = VisionTransformer(ViTConfig(**TINY, untie_cls_norm=True))
    with pytest.raises(WeightsError, match=r"cls_norm\.bias"):
        to_transformers(network.state_dict(), "vit")


class TestBiasMasks:
    """What files hold: an all-zero mask, none, [1, 0, 1], NaN."""

    config = ViTConfig(**TINY)

    def state(self, mask):
        name = "blocks.0.attn.qkv.bias"
        state = {name: torch.cat([torch.ones(64), torch.zeros(64), torch.ones(64)])}
        return state if mask is None else {**state, f"{name}_mask": mask}

    def test_zero_mask_counts_and_is_said(self):
        notices = Notices()
        settled = settle_biases(self.state(torch.zeros(192)), self.config, notices)
        assert not settled["blocks.0.attn.qkv.bias_mask"].any()
        assert any("all zero" in line for line in notices.summary())

    def test_missing_mask_is_one_nought_one(self):
        notices = Notices()
        settled = settle_biases(self.state(None), self.config, notices)
        thirds = settled["blocks.0.attn.qkv.bias_mask"].chunk(3)
        assert [third.unique().tolist() for third in thirds] == [[1], [0], [1]]
        assert any("no bias_mask" in line for line in notices.summary())

    def test_usual_mask_says_nothing(self):
        notices = Notices()
        mask = torch.ones(3, 64)
        mask[1] = 0
        settled = settle_biases(self.state(mask.flatten()), self.config, notices)
        assert torch.equal(settled["blocks.0.attn.qkv.bias_mask"], mask.flatten())
        assert not notices.summary()

    def test_nan_mask_is_refused(self):
        with pytest.raises(WeightsError, match="bias_mask holds NaN"):
            settle_biases(self.state(torch.full((192,), torch.nan)), self.config, Notices())

    def test_dead_biases_are_dropped_where_none_are_wanted(self):
        config = ViTConfig(**TINY, qkv_bias=False)
        assert settle_biases(self.state(torch.zeros(192)), config, Notices()) == {}
        assert settle_biases(self.state(torch.ones(192)), config, Notices()) != {}

    @torch.no_grad()
    def test_zero_mask_makes_the_network_act_without_bias(self, scatter):
        dead = scatter(VisionTransformer(self.config))
        state = official_vit_to_ours(dead.state_dict())
        for name in state:
            if name.endswith("bias_mask"):
                state[name] = torch.zeros_like(state[name])
        dead.load_state_dict(state)
        plain = VisionTransformer(ViTConfig(**TINY, qkv_bias=False)).eval()
        fit(plain, {k: v for k, v in state.items() if ".qkv.bias" not in k}, "it")
        images = torch.randn(1, 3, 32, 48)
        assert torch.equal(dead(images).patches, plain(images).patches)


def test_fit_names_what_is_missing_unexpected_and_misshaped():
    network = VisionTransformer(ViTConfig(**TINY))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = {k: torch.ones_like(v) for k, v in before.items()}
    del state["cls_token"]
    state["head.weight"] = torch.ones(1)
    state["norm.weight"] = torch.ones(5)
    with pytest.raises(WeightsError) as caught:
        fit(network, state, "'x'")
    for part in ("missing 1 tensor (cls_token)", "unexpected 1 tensor (head.weight)"):
        assert part in str(caught.value)
    assert "mis-shaped 1 tensor (norm.weight: (5,) instead of (64,))" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    spoilt = {k: v.clone() for k, v in before.items()}
    spoilt["norm.bias"][3] = torch.nan
    with pytest.raises(WeightsError, match=r"NaN or infinite values in 1 tensor \(norm\.bias\)"):
        fit(network, spoilt, "'x'")


def test_wrappers_of_trainers_are_stripped():
    tensor = torch.zeros(1)
    teacher = {"backbone.cls_token": tensor, "dino_head.w": tensor, "ibot_head.w": tensor}
    assert list(strip_wrappers({"teacher": teacher})) == ["cls_token"]
    assert list(strip_wrappers({"_orig_mod.cls_token": tensor})) == ["cls_token"]
    with pytest.raises(WeightsError, match="optimizer"):
        strip_wrappers({"teacher": {**teacher, "optimizer": tensor}})
    with pytest.raises(WeightsError, match=r"no tensors \(step\)"):
        strip_wrappers({"step": 3, "cls_token": tensor})


def test_two_final_norms_that_differ_are_refused():
    state = ours_to_official_convnext(ConvNeXt(ConvNeXtConfig(**CNX)).state_dict())
    assert "norms.3.weight" in state
    assert "norms.3.weight" not in official_convnext_to_ours(state)
    state["norms.3.weight"] = state["norms.3.weight"] + 1
    with pytest.raises(WeightsError, match=r"norms\.3\.weight differ"):
        official_convnext_to_ours(state)

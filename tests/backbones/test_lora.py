"""Adapters against the plain network, and against full weights `W + alpha / rank * B A`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dino_adapters.backbones import (
    ConvNeXt,
    ConvNeXtConfig,
    VisionTransformer,
    ViTConfig,
    add_lora,
    has_lora,
    merged,
    share_frozen,
)
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.backbones.foreign import create_timm
from dino_adapters.contracts import RecipeError, WeightsError
from dino_adapters.runtime.chance import generator

DEPTH = 3
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
SMALL = {"depth": DEPTH, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8}
USUAL: Any = {
    "rank": 3,
    "alpha": 6.0,
    "targets": ("qkv",),
    "open_blocks": 1,
    "norms": True,
    "seed": 0,
}


def ours(**options):
    config = ViTConfig(embed_dim=24, depth=DEPTH, num_heads=2, patch_size=8, registers=2, **options)
    return VisionTransformer(config)


def timm(name="vit_tiny_patch16_224", **more):
    return create_timm(name, arguments={**SMALL, **more})


NETWORKS = {
    "ours, masked key bias": (lambda: ours(), "", ("qkv", "proj", "fc1", "fc2")),
    "ours, plain qkv": (lambda: ours(mask_k_bias=False), "", ("qkv", "fc2")),
    "ours, swiglu and rmsnorm": (
        lambda: ours(ffn="swiglu", norm="rmsnorm", untie_cls_norm=True),
        "",
        ("qkv", "w1", "w3"),
    ),
    "timm": (lambda: timm(init_values=0.1), "model.", ("qkv", "proj")),
    "timm without qkv bias": (lambda: timm("vit_small_patch16_dinov3"), "model.", ("qkv", "fc1")),
}


@pytest.fixture(params=NETWORKS)
def case(request, scatter):
    make, prefix, targets = NETWORKS[request.param]
    return scatter(make()), prefix, targets


def disturb(network, seed=1):
    """Gives B a value, so that adapters act."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=chance).mul_(0.3)
    return network


def outputs(network):
    features = network(IMAGES)
    return torch.cat([features.cls[:, None], features.registers, features.patches], 1)


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def test_outputs_stay_equal_to_the_bit(case):
    network, _, targets = case
    before = outputs(network)
    add_lora(network, **USUAL | {"targets": targets})
    assert torch.equal(outputs(network), before)
    assert has_lora(network)


@torch.no_grad()
def test_names_shapes_and_values_of_the_base_stay(case):
    network, prefix, targets = case
    before = {name: value.clone() for name, value in network.state_dict().items()}
    add_lora(network, **USUAL | {"targets": targets})
    after = network.state_dict()
    added = {}
    for index in range(DEPTH - 1):
        for name, layer in network.get_submodule(f"{prefix}blocks.{index}").named_modules():
            if name.split(".")[-1] in targets:
                path = f"{prefix}blocks.{index}.{name}"
                added[f"{path}.lora_a"] = (3, layer.in_features)
                added[f"{path}.lora_b"] = (layer.out_features, 3)
    assert len(added) == 2 * len(targets) * (DEPTH - 1)
    assert set(after) == set(before) | set(added)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name, shape in added.items():
        assert after[name].shape == shape
        assert after[name].dtype == torch.float32
        assert bool(after[name].any()) is name.endswith("lora_a")


@torch.no_grad()
def test_adapters_are_a_change_of_the_weight(case):
    """The slow way: full weights of a second, plain network."""
    network, _, targets = case
    plain = copy.deepcopy(network)
    before = outputs(plain)
    add_lora(network, **USUAL | {"targets": targets})
    state = disturb(network).state_dict()
    for name, weight in plain.state_dict().items():
        beside = name.removesuffix("weight")
        if beside + "lora_a" in state:
            product = state[beside + "lora_b"].double() @ state[beside + "lora_a"].double()
            weight.copy_(weight.double() + 6.0 / 3 * product)
    expected = outputs(plain)
    assert not torch.allclose(expected, before, atol=1e-2)
    assert torch.allclose(outputs(network), expected, atol=2e-5, rtol=1e-5)
    folded = merged(network)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in folded.modules()] == [vars(m).keys() for m in plain.modules()]
    assert not has_lora(folded)
    assert has_lora(network)
    assert torch.allclose(outputs(folded), expected, atol=2e-5, rtol=1e-5)


def test_merging_nothing_is_the_network_itself():
    network = ours()
    assert merged(network) is network


@torch.no_grad()
def test_merging_copies_a_network_that_has_draws(scatter):
    network = scatter(ours())
    add_lora(network, **USUAL)
    network.set_draws(RandomDraws(generator(0, "network", 5)))
    folded = merged(disturb(network))
    assert torch.allclose(outputs(folded), outputs(network), atol=2e-5)
    kept = {name for name in trained(network) if "lora" not in name}
    assert trained(folded) == kept


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("open_blocks", [0, 1, 2])
def test_who_is_trained(open_blocks, norms):
    network = ours(untie_cls_norm=True)
    summary = add_lora(network, **USUAL | {"open_blocks": open_blocks, "norms": norms})
    expected = set()
    for name, _ in network.named_parameters():
        place = name.split(".")
        whole = place[0] == "blocks" and int(place[1]) >= DEPTH - open_blocks
        gain = any(part in name for part in ("norm", "ls1", "ls2"))
        if whole or "lora_" in name or (norms and gain):
            expected.add(name)
    assert trained(network) == expected
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    assert summary.trained == sum(sizes[name] for name in expected)
    assert summary.parameters == sum(sizes.values())
    assert summary.layers == DEPTH - open_blocks
    assert summary.sentence().startswith(f"{DEPTH - open_blocks} linear layers have adapters; ")
    assert f"{summary.trained:,} of {summary.parameters:,} parameters" in summary.sentence()


def test_gains_of_timm_are_found_wherever_they_lie():
    for network in (timm(init_values=0.1), timm("vit_small_patch16_dinov3")):
        add_lora(network, **USUAL | {"open_blocks": 0})
        plain = {n for n in trained(network) if "lora" not in n}
        words = ("norm", "gamma")
        assert plain == {n for n, _ in network.named_parameters() if any(w in n for w in words)}
        assert any("gamma" in name for name in plain)


@pytest.mark.parametrize(("make", "stem"), [(ours, "patch_embed."), (timm, "model.patch_embed.")])
def test_an_open_stem(make, stem):
    closed, opened = make(), make()
    add_lora(closed, **USUAL)
    add_lora(opened, **USUAL, open_stem=True)
    names = {f"{stem}proj.weight", f"{stem}proj.bias"}
    assert trained(opened) - trained(closed) == names


def test_the_seed_decides_about_a():
    states = []
    for seed in (0, 0, 1):
        network = ours()
        torch.manual_seed(len(states))
        add_lora(network, **USUAL | {"seed": seed})
        states.append({n: v for n, v in network.state_dict().items() if n.endswith("lora_a")})
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    a, b = first.values()
    assert not torch.equal(a, b)
    assert float(a.abs().max()) <= 24**-0.5


def test_gradients_reach_adapters_and_spare_the_base(case):
    network, _, targets = case
    add_lora(network, **USUAL | {"targets": targets, "norms": False})
    outputs(network.train()).square().mean().backward()
    found = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    # While B is 0, it alone learns.
    assert all(bool(g.any()) is n.endswith("b") for n, g in found.items() if "lora" in n)
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["ours, masked key bias", "timm"])
@torch.no_grad()
def test_autocast(name, scatter):
    network = scatter(NETWORKS[name][0]())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = outputs(network)
    add_lora(network, **USUAL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(outputs(network), plain)
    exact = outputs(disturb(network))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = outputs(network)
    assert float((rough - exact).abs().mean() / exact.abs().mean()) < 0.03


def test_double_weights_get_double_adapters(scatter):
    network = scatter(ours().double())
    add_lora(network, **USUAL)
    disturb(network)
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    with torch.no_grad():
        fine = [network(IMAGES.double()).cls, merged(network)(IMAGES.double()).cls]
    assert torch.allclose(*fine, atol=1e-12, rtol=0.0)


@torch.no_grad()
def test_copies_and_state_dicts_go_round(case):
    network, _, targets = case
    again = copy.deepcopy(network)
    add_lora(network, **USUAL | {"targets": targets})
    disturb(network)
    twin = copy.deepcopy(network)
    assert torch.equal(outputs(twin), outputs(network))
    assert trained(twin) == trained(network)
    add_lora(again, **USUAL | {"targets": targets, "seed": 9})
    again.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(outputs(again), outputs(network))


def test_masks_of_keys_still_act(scatter):
    network = scatter(ours())
    add_lora(network, **USUAL)
    layer = network.blocks[0].attn.qkv
    layer.bias_mask.zero_()
    with torch.no_grad():
        before = outputs(network)
        layer.bias.add_(1.0)
        assert torch.equal(outputs(network), before)
        layer.reset_mask()
        assert not torch.equal(outputs(network), before)


def test_shared_weights_are_the_very_same(case):
    student, prefix, targets = case
    add_lora(student, **USUAL | {"targets": targets})
    average = copy.deepcopy(student)
    average.requires_grad_(False)
    with torch.no_grad():
        before = outputs(average)
    frozen = [p for p in student.parameters() if not p.requires_grad]
    assert share_frozen(average, student) == sum(4 * p.numel() for p in frozen)
    assert share_frozen(average, student) == 0
    there = dict(average.named_parameters())
    for name, parameter in student.named_parameters():
        assert (there[name] is parameter) is not parameter.requires_grad
    assert list(average.state_dict()) == list(student.state_dict())
    disturb(student)
    with torch.no_grad():
        assert torch.equal(outputs(average), before)
        for name, parameter in student.named_parameters():  # a moving average, as it is taken
            there[name].lerp_(parameter, 0.5)
    state = average.state_dict()
    assert torch.equal(
        state[f"{prefix}blocks.0.attn.qkv.lora_b"],
        student.state_dict()[f"{prefix}blocks.0.attn.qkv.lora_b"] / 2,
    )
    assert torch.equal(
        state[f"{prefix}blocks.0.attn.qkv.weight"],
        student.state_dict()[f"{prefix}blocks.0.attn.qkv.weight"],
    )


def test_averages_that_differ_are_not_shared():
    student = ours()
    average = copy.deepcopy(student)
    add_lora(student, **USUAL)
    with torch.no_grad():
        average.cls_token.add_(1.0)
    with pytest.raises(WeightsError, match=r"'cls_token' is frozen .* holds other values"):
        share_frozen(average, student)
    assert average.patch_embed.proj.weight is not student.patch_embed.proj.weight
    with pytest.raises(WeightsError, match="holds none of that name"):
        share_frozen(nn.Linear(1, 1), student)


@pytest.mark.parametrize(
    ("make", "changes", "match"),
    [
        (
            lambda: ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))),
            {},
            "ConvNeXt has no blocks with linear layers",
        ),
        (lambda: create_timm("resnet10t"), {}, "resnet10t has no blocks"),
        (lambda: create_timm("mobilenetv3_small_050"), {}, "mobilenetv3_small_050 has no blocks"),
        (ours, {"targets": ("qkv", "qvk")}, "no linear layer called 'qvk'. Did you mean 'qkv'?"),
        (ours, {"targets": ("wide",)}, "called 'wide'. Known: fc1, fc2, proj, qkv."),
        (ours, {"open_blocks": 3}, "open_blocks is 3 and VisionTransformer has 3 blocks"),
        (lambda: timm("eva02_tiny_patch14_224"), {}, "reads the weight of its layer 'qkv' past"),
    ],
)
def test_what_cannot_be_adapted(make, changes, match):
    network = make()
    before = list(network.state_dict())
    with pytest.raises(RecipeError) as error:
        add_lora(network, **USUAL | changes)
    assert match in str(error.value)
    assert list(network.state_dict()) == before
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_once_is_enough():
    network = ours()
    add_lora(network, **USUAL)
    with pytest.raises(RecipeError, match="has adapters already"):
        add_lora(network, **USUAL)


@torch.no_grad()
def test_attentions_that_bypass_qkv_take_adapters_elsewhere(scatter):
    network = scatter(timm("eva02_tiny_patch14_224"))
    before = outputs(network)
    add_lora(network, **USUAL | {"targets": ("proj", "fc1")})
    assert torch.equal(outputs(network), before)
    assert not torch.allclose(outputs(disturb(network)), before, atol=1e-2)


def test_every_layer_of_timm_that_is_taken_takes_part():
    """Adapters that no forward pass reaches would learn nothing, and nobody would know."""
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"):
        network = timm(name)
        add_lora(network, **USUAL | {"targets": ("qkv", "proj", "fc1", "fc2"), "norms": False})
        outputs(network).square().mean().backward()
        lost = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert [n for n in lost if "lora" in n] == []

"""Schedules at their edges, and who gets which rate."""

import logging
import re

import pytest
import torch
from torch import nn

from dino_adapters.backbones import (
    ConvNeXt,
    ConvNeXtConfig,
    VisionTransformer,
    ViTConfig,
    add_lora,
)
from dino_adapters.backbones.foreign import create_timm
from dino_adapters.pretrain.optim import (
    Timetable,
    clip,
    parameter_groups,
    set_rates,
)
from dino_adapters.pretrain.prototypes import ProjectionHead
from dino_adapters.pretrain.schedules import half_cosine
from dino_adapters.recipes.pretrain import PretrainRecipe


def recipe(**changes):
    return PretrainRecipe.model_validate({"data": {"source": "x"}, "steps": 100, **changes})


def lr_over(steps, *, end, warmup):
    told = recipe(steps=steps, optim={"lr": 1.0, "lr_end": end}, schedule={"warmup": warmup})
    return [Timetable(told).at(step).lr for step in range(steps)]


def test_warmup_starts_at_zero_peaks_and_ends():
    values = lr_over(100, end=0.1, warmup=0.1)
    assert values[0] == 0.0
    assert values[10] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert max(values) == 1.0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (10, 10), (10, 0)])
def test_warmup_edges_stay_between_zero_and_peak(steps, warmup):
    values = lr_over(steps, end=0.0, warmup=warmup / steps)
    assert all(0.0 <= value <= 1.0 for value in values)


def test_half_cosine_is_flat_at_both_ends():
    assert half_cosine(0, 10, 0.04, 0.4) == pytest.approx(0.04)
    assert half_cosine(10, 10, 0.04, 0.4) == pytest.approx(0.4)
    assert half_cosine(5, 10, 0.04, 0.4) == pytest.approx(0.22)
    assert half_cosine(70, 10, 0.04, 0.4) == pytest.approx(0.4)


def test_knobs_over_a_run():
    told = recipe(schedule={"freeze_last_layer": 0.05, "momentum": (0.99, 1.0)})
    first, later, last = Timetable(told).at(0), Timetable(told).at(50), Timetable(told).at(99)
    assert Timetable(told).at(4).prototype_lr == 0.0
    assert Timetable(told).at(5).prototype_lr == Timetable(told).at(5).lr > 0.0
    assert first.teacher_temperature == pytest.approx(0.04)
    assert later.teacher_temperature == last.teacher_temperature == pytest.approx(0.07)
    assert first.momentum == pytest.approx(0.99)
    assert last.momentum == pytest.approx(1.0)
    assert last.lr == pytest.approx(told.optim.lr_end)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2)])
        self.norm = nn.LayerNorm(4)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.last_layer = nn.Linear(4, 9, bias=False)


def rates(modules, **options):
    names = {
        id(p): f"{m}.{n}" for m, module in modules.items() for n, p in module.named_parameters()
    }
    groups = parameter_groups(modules, **options)
    return {names[id(p)]: g for g in groups for p in g["params"]}


def test_layer_decay_patch_multiplier_and_weight_decay():
    modules = {"backbone": Toy(), "dino_head": Head()}
    found = rates(modules, layer_decay=0.5, patch_embed=0.2)
    assert set(found) == {f"{m}.{n}" for m in modules for n, _ in modules[m].named_parameters()}
    expected = {
        "backbone.cls_token": (0.125, 0.0, False),
        "backbone.patch_embed.proj.weight": (0.025, 1.0, False),
        "backbone.patch_embed.proj.bias": (0.025, 0.0, False),
        "backbone.blocks.0.fc.weight": (0.25, 1.0, False),
        "backbone.blocks.1.fc.weight": (0.5, 1.0, False),
        "backbone.norm.weight": (1.0, 0.0, False),
        "dino_head.last_layer.weight": (1.0, 1.0, True),
    }
    for name, (lr, decay, prototype) in expected.items():
        group = found[name]
        assert group["lr_multiplier"] == pytest.approx(lr), name
        assert (group["weight_decay_multiplier"], group["prototype"]) == (decay, prototype), name


def vit(depth=12, **options):
    return VisionTransformer(
        ViTConfig(embed_dim=8, depth=depth, num_heads=1, patch_size=4, registers=2, **options)
    )


def convnext():
    return ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10)))


def timm_vit(name="vit_tiny_patch16_224", **more):
    arguments = {"depth": 3, "embed_dim": 12, "num_heads": 1, "img_size": 32, **more}
    return create_timm(name, arguments=arguments)


def adapted(network, **changes):
    settings = {"rank": 2, "alpha": 4.0, "targets": ("qkv",), "open_blocks": 1, "norms": True}
    add_lora(network, **settings | changes, seed=0)
    return network


def heads(kind):
    return ProjectionHead(8, 9, hidden_dim=7, bottleneck_dim=5, weight_norm=kind)


STUDENTS = {
    "vit": lambda: {"backbone": vit(), "dino_head": heads("none"), "ibot_head": heads("none")},
    "untied": lambda: {"backbone": vit(untie_cls_norm=True, untie_local_cls_norm=True)},
    "swiglu": lambda: {"backbone": vit(ffn="swiglu", qkv_bias=False, norm="rmsnorm")},
    "convnext": lambda: {"backbone": convnext(), "dino_head": heads("free")},
    "fixed gains": lambda: {"dino_head": heads("fixed")},
    "lora": lambda: {"backbone": adapted(vit()), "dino_head": heads("free")},
    "lora alone": lambda: {"backbone": adapted(vit(), norms=False, open_blocks=0)},
    "timm vit": lambda: {"backbone": timm_vit(), "dino_head": heads("none")},
    "timm vit with lora": lambda: {"backbone": adapted(timm_vit()), "ibot_head": heads("none")},
    "timm eva": lambda: {"backbone": timm_vit("eva02_tiny_patch14_224", patch_size=16)},
    "timm cnn": lambda: {"backbone": create_timm("resnet10t"), "dino_head": heads("none")},
    "timm cnn with blocks": lambda: {"backbone": create_timm("mobilenetv3_small_050")},
}


@pytest.mark.parametrize("rule", ["shape", "name"])
@pytest.mark.parametrize("student", STUDENTS)
def test_every_trained_parameter_is_in_one_group(student, rule):
    modules = STUDENTS[student]()
    first, *_ = (p for m in modules.values() for p in m.parameters() if p.requires_grad)
    first.requires_grad_(False)
    groups = parameter_groups(modules, layer_decay=0.9, patch_embed=0.2, decay_rule=rule)
    held = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for m in modules.values() for p in m.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained)
    assert id(first) not in held
    backbone = modules.get("backbone", nn.Module())
    marked = {id(p) for group in groups if group["backbone"] for p in group["params"]}
    assert marked == {id(p) for p in backbone.parameters() if p.requires_grad}
    keys = [tuple(value for name, value in g.items() if name != "params") for g in groups]
    assert len(set(keys)) == len(keys)


# (rate over the schedule's, decayed by shape, decayed by name) for 12 blocks and 0.9.
TABLE = {
    "cls_token": (0.2542, 0, 1),
    "register_tokens": (0.2542, 0, 1),
    "mask_token": (0.2542, 0, 1),
    "patch_embed.proj.weight": (0.0508, 1, 1),
    "patch_embed.proj.bias": (0.0508, 0, 0),
    "blocks.0.attn.qkv.weight": (0.2824, 1, 1),
    "blocks.0.attn.qkv.bias": (0.2824, 0, 0),
    "blocks.0.ls1.gamma": (0.2824, 0, 0),
    "blocks.10.norm2.weight": (0.81, 0, 0),
    "blocks.11.mlp.fc1.weight": (0.9, 1, 1),
    "norm.weight": (1.0, 0, 0),
    "cls_norm.weight": (1.0, 0, 0),
    "local_cls_norm.bias": (1.0, 0, 0),
}
CONVNEXT = {
    "downsample_layers.0.0.weight": (1.0, 1, 1),
    "downsample_layers.0.1.weight": (1.0, 0, 1),  # a norm without the word
    "downsample_layers.1.0.weight": (1.0, 0, 1),
    "downsample_layers.1.0.bias": (1.0, 0, 0),
    "stages.0.0.gamma": (1.0, 0, 0),
    "stages.2.0.norm.weight": (1.0, 0, 0),
    "stages.3.0.pwconv1.weight": (1.0, 1, 1),
    "norm.weight": (1.0, 0, 0),
}
ADAPTERS = {
    "blocks.0.attn.qkv.lora_a": (0.2824, 1, 1),
    "blocks.0.attn.qkv.lora_b": (0.2824, 1, 1),
    "blocks.10.attn.qkv.lora_a": (0.81, 1, 1),
    "blocks.3.norm1.weight": (0.3874, 0, 0),
    "blocks.11.attn.qkv.weight": (0.9, 1, 1),
    "norm.weight": (1.0, 0, 0),
}
# Three blocks of timm: as ours.
TIMM_VIT = {
    "model.cls_token": (0.6561, 0, 1),
    "model.reg_token": (0.6561, 0, 1),
    "model.pos_embed": (0.6561, 0, 1),
    "model.patch_embed.proj.weight": (0.1312, 1, 1),
    "model.patch_embed.proj.bias": (0.1312, 0, 0),
    "model.blocks.0.attn.qkv.weight": (0.729, 1, 1),
    "model.blocks.1.mlp.fc1.bias": (0.81, 0, 0),
    "model.blocks.2.norm1.weight": (0.9, 0, 0),
    "model.norm.weight": (1.0, 0, 0),
}
TIMM_EVA = {
    "model.cls_token": (0.6561, 0, 1),
    "model.pos_embed": (0.6561, 0, 1),
    "model.blocks.0.attn.q_bias": (0.729, 0, 0),
    "model.blocks.2.mlp.fc1.weight": (0.9, 1, 1),
    "model.fc_norm.weight": (1.0, 0, 0),
}
TIMM_LORA = {
    "model.blocks.0.attn.qkv.lora_a": (0.729, 1, 1),
    "model.blocks.1.attn.qkv.lora_b": (0.81, 1, 1),
    "model.blocks.2.attn.qkv.weight": (0.9, 1, 1),
    "model.norm.bias": (1.0, 0, 0),
}
# Stem and four stages, the last of which is the top.
TIMM_CNN = {
    "model.conv1.0.weight": (0.6561, 1, 1),
    "model.bn1.weight": (0.6561, 0, 1),
    "model.layer1.0.conv1.weight": (0.729, 1, 1),
    "model.layer3.0.bn2.bias": (0.9, 0, 0),
    "model.layer4.0.downsample.1.weight": (1.0, 1, 1),
}
PROTOTYPES = {
    "mlp.0.weight": (1.0, 1, 1),
    "mlp.4.bias": (1.0, 0, 0),
    "last_layer.parametrizations.weight.original0": (1.0, 0, 1),
    "last_layer.parametrizations.weight.original1": (1.0, 1, 1),
}


@pytest.mark.parametrize("rule", ["shape", "name"])
@pytest.mark.parametrize(
    ("make", "table"),
    [
        (lambda: vit(untie_cls_norm=True, untie_local_cls_norm=True), TABLE),
        (lambda: adapted(vit()), ADAPTERS),
        (convnext, CONVNEXT),
        (lambda: heads("free"), PROTOTYPES),
        (lambda: timm_vit("vit_tiny_patch16_224", reg_tokens=2), TIMM_VIT),
        (lambda: timm_vit("eva02_tiny_patch14_224", patch_size=16), TIMM_EVA),
        (lambda: adapted(timm_vit()), TIMM_LORA),
        (lambda: create_timm("resnet10t"), TIMM_CNN),
    ],
    ids=["vit", "lora", "convnext", "head", "timm vit", "timm eva", "timm lora", "timm cnn"],
)
def test_rates_by_name(make, table, rule):
    found = rates({"it": make()}, layer_decay=0.9, patch_embed=0.2, decay_rule=rule)
    for name, (lr, by_shape, by_name) in table.items():
        group = found[f"it.{name}"]
        assert group["lr_multiplier"] == pytest.approx(lr, abs=5e-5), name
        decay = by_name if rule == "name" else by_shape
        assert group["weight_decay_multiplier"] == decay, name
        assert group["prototype"] == ("last_layer" in name)


def test_a_timm_vit_is_paced_as_ours_is():
    """One rule, so that a network does not train otherwise for its origin."""
    theirs = rates({"it": timm_vit()}, layer_decay=0.8, patch_embed=0.2)
    ours = rates({"it": vit(depth=3)}, layer_decay=0.8, patch_embed=0.2)
    same = {name: f"it.model.{name.removeprefix('it.')}" for name in ours}
    both = {name for name in ours if same[name] in theirs}
    assert len(both) > 30
    for name in both:
        assert theirs[same[name]]["lr_multiplier"] == ours[name]["lr_multiplier"], name


def test_stages_of_a_timm_cnn_follow_each_other():
    network = create_timm("mobilenetv3_small_050")
    found = rates({"it": network}, layer_decay=0.5, patch_embed=0.2)
    depth = len(network.model.blocks)
    for name, group in found.items():
        stage = re.match(r"it\.model\.blocks\.(\d+)\.", name)
        if stage:
            assert group["lr_multiplier"] == 0.5 ** (depth - int(stage.group(1))), name
        else:
            below = name.startswith(("it.model.conv_stem.", "it.model.bn1."))
            assert group["lr_multiplier"] == (0.5 ** (depth + 1) if below else 1.0), name


@pytest.mark.parametrize("layer_decay", [0.9, 1.0])
def test_a_network_that_tells_no_layers_is_said_once(layer_decay, monkeypatch, caplog):
    network = create_timm("resnet10t")
    monkeypatch.delattr(type(network.model), "group_matcher")
    with caplog.at_level(logging.WARNING, logger="dino_adapters"):
        found = rates({"backbone": network}, layer_decay=layer_decay, patch_embed=0.2)
    assert {group["lr_multiplier"] for group in found.values()} == {1.0}
    said = [r.message for r in caplog.records if "resnet10t does not say where" in r.message]
    assert len(said) == (layer_decay < 1.0)


def test_a_network_that_refuses_stages_is_paced_by_blocks():
    arguments = {
        "num_init_features": 8,
        "growth_rates": (8, 8),
        "num_blocks_list": (1, 1),
        "is_downsample_block": (None, True),
        "transition_compression_ratio": 0.5,
    }
    network = create_timm("rdnet_tiny", arguments=arguments)
    with pytest.raises(AssertionError):
        network.model.group_matcher(coarse=True)
    found = rates({"it": network}, layer_decay=0.5, patch_embed=0.2)
    values = [group["lr_multiplier"] for group in found.values()]
    assert found["it.model.stem.0.weight"]["lr_multiplier"] == min(values) < 0.5 < max(values) == 1


def test_set_rates_freezes_prototypes_alone():
    groups = parameter_groups({"b": Toy(), "h": Head()}, layer_decay=1.0, patch_embed=1.0)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_rates(optimizer, Timetable(recipe(schedule={"warmup": 0.0})).at(0))
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["prototype"] else 1e-3)


def test_clip_bounds_each_module_by_itself():
    loud, quiet = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    loud.weight.grad = torch.full((2, 2), 50.0)
    quiet.weight.grad = torch.full((2, 2), 0.5)
    norms = clip({"loud": loud, "quiet": quiet}, 3.0, each="module")
    assert norms == pytest.approx({"loud": 100.0, "quiet": 1.0})
    assert float(loud.weight.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    assert float(quiet.weight.grad.norm()) == pytest.approx(1.0)


def test_clip_may_bound_each_tensor_by_itself():
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), 50.0)
    layer.bias.grad = torch.tensor([0.6, 0.8])
    norms = clip({"it": layer}, 3.0, each="tensor")
    assert norms == pytest.approx({"it": (100.0**2 + 1.0) ** 0.5})
    assert float(layer.weight.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    assert float(layer.bias.grad.norm()) == pytest.approx(1.0)


def test_no_limit_leaves_gradients_alone():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.grad = torch.full((2, 2), 50.0)
    assert clip({"it": layer}, None, each="module") == pytest.approx({"it": 100.0})
    assert float(layer.weight.grad.norm()) == pytest.approx(100.0)

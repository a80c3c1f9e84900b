"""Schedules at their edges, and who gets which rate."""

import pytest
import torch
from torch import nn

from dino_adapters.backbones import ConvNeXt, ConvNeXtConfig, VisionTransformer, ViTConfig
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


def vit(**options):
    return VisionTransformer(
        ViTConfig(embed_dim=8, depth=12, num_heads=1, patch_size=4, registers=2, **options)
    )


def convnext():
    return ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10)))


def heads(kind):
    return ProjectionHead(8, 9, hidden_dim=7, bottleneck_dim=5, weight_norm=kind)


STUDENTS = {
    "vit": lambda: {"backbone": vit(), "dino_head": heads("none"), "ibot_head": heads("none")},
    "untied": lambda: {"backbone": vit(untie_cls_norm=True, untie_local_cls_norm=True)},
    "swiglu": lambda: {"backbone": vit(ffn="swiglu", qkv_bias=False, norm="rmsnorm")},
    "convnext": lambda: {"backbone": convnext(), "dino_head": heads("free")},
    "fixed gains": lambda: {"dino_head": heads("fixed")},
}


@pytest.mark.parametrize("rule", ["shape", "name"])
@pytest.mark.parametrize("student", STUDENTS)
def test_every_trained_parameter_is_in_one_group(student, rule):
    modules = STUDENTS[student]()
    still = next(iter(modules.values())).get_parameter(
        "mlp.0.weight" if student == "fixed gains" else "norm.weight"
    )
    still.requires_grad_(False)
    groups = parameter_groups(modules, layer_decay=0.9, patch_embed=0.2, decay_rule=rule)
    held = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for m in modules.values() for p in m.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained)
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
        (convnext, CONVNEXT),
        (lambda: heads("free"), PROTOTYPES),
    ],
    ids=["vit", "convnext", "head"],
)
def test_rates_of_12_blocks_a_convnext_and_a_head(make, table, rule):
    found = rates({"it": make()}, layer_decay=0.9, patch_embed=0.2, decay_rule=rule)
    for name, (lr, by_shape, by_name) in table.items():
        group = found[f"it.{name}"]
        assert group["lr_multiplier"] == pytest.approx(lr, abs=5e-5), name
        decay = by_name if rule == "name" else by_shape
        assert group["weight_decay_multiplier"] == decay, name
        assert group["prototype"] == ("last_layer" in name)


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

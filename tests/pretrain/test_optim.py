"""Schedules at their edges, and who gets which rate."""

import pytest
import torch
from torch import nn

from dino_adapters.pretrain.optim import (
    clip,
    half_cosine,
    knobs_at,
    parameter_groups,
    set_rates,
    warmup_cosine,
)
from dino_adapters.recipes.pretrain import PretrainRecipe


def recipe(**changes):
    return PretrainRecipe.model_validate({"data": {"source": "x"}, "steps": 100, **changes})


def test_warmup_starts_at_zero_peaks_and_ends():
    values = [warmup_cosine(step, 100, 1.0, 0.1, 0.1) for step in range(100)]
    assert values[0] == 0.0
    assert values[10] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert max(values) == 1.0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (2, 0.5), (10, 1.0), (10, 0.0)])
def test_warmup_edges_stay_between_zero_and_peak(steps, warmup):
    values = [warmup_cosine(step, steps, 1.0, 0.0, warmup) for step in range(steps)]
    assert all(0.0 <= value <= 1.0 for value in values)


def test_half_cosine_is_flat_at_both_ends():
    assert half_cosine(0.0, 0.04, 0.4) == pytest.approx(0.04)
    assert half_cosine(1.0, 0.04, 0.4) == pytest.approx(0.4)
    assert half_cosine(0.5, 0.04, 0.4) == pytest.approx(0.22)
    assert half_cosine(7.0, 0.04, 0.4) == pytest.approx(0.4)


def test_knobs_over_a_run():
    told = recipe(schedule={"freeze_last_layer": 0.05, "momentum": (0.99, 1.0)})
    first, later, last = knobs_at(0, told), knobs_at(50, told), knobs_at(99, told)
    assert knobs_at(4, told).prototype_lr == 0.0
    assert knobs_at(5, told).prototype_lr == knobs_at(5, told).lr > 0.0
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
    return {names[id(p)]: g for g in groups for p in g["params"]}  # pyright: ignore


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


def test_set_rates_freezes_prototypes_alone():
    groups = parameter_groups({"b": Toy(), "h": Head()}, layer_decay=1.0, patch_embed=1.0)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_rates(optimizer, knobs_at(0, recipe(schedule={"warmup": 0.0})))
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["prototype"] else 1e-3)


def test_clip_bounds_each_module_by_itself():
    loud, quiet = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    loud.weight.grad = torch.full((2, 2), 50.0)
    quiet.weight.grad = torch.full((2, 2), 0.5)
    norm = clip([loud, quiet], 3.0)
    assert norm == pytest.approx((100.0**2 + 1.0) ** 0.5)
    assert float(loud.weight.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    assert float(quiet.weight.grad.norm()) == pytest.approx(1.0)


def test_no_limit_leaves_gradients_alone():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.grad = torch.full((2, 2), 50.0)
    assert clip([layer], None) == pytest.approx(100.0)
    assert float(layer.weight.grad.norm()) == pytest.approx(100.0)

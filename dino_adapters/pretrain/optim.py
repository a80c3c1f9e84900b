"""Parameter groups, schedules and clipping."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dino_adapters.pretrain.prototypes import GAIN
from dino_adapters.pretrain.schedules import (
    cosine_table,
    frozen_start,
    half_cosine,
    linear_rise,
    scaled_rate,
    warmup_cosine,
)
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.sections import GramRecipe

TOKENS = ("cls_token", "register_tokens", "mask_token", "pos_embed")


@dataclass(frozen=True, slots=True)
class Knobs:
    """What the schedules say for one step."""

    step: int
    lr: float
    prototype_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    local_weight: float = 1.0
    regularizer_weight: float = 0.1
    gram_weight: float = 0.0


class Timetable:
    """Every scheduled value of a run; nothing in it changes, so that resuming needs no state."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        """Makes the tables of the recipe's family, read in every step."""
        steps, optim, schedule = recipe.steps, recipe.optim, recipe.schedule
        cold, warm = recipe.objective.teacher_temperature
        old = schedule.family == "v2"
        peak = scaled_rate(optim.lr, optim.batch_size, optim.lr_rule)
        warmup, rise = round(schedule.warmup * steps), round(schedule.temperature_warmup * steps)
        if old:  # only the peak is scaled
            lr = cosine_table(steps, base=peak, end=optim.lr_end, warmup=warmup)
            temperature = linear_rise(rise, steps, cold, warm)
        else:
            end = scaled_rate(optim.lr_end, optim.batch_size, optim.lr_rule)
            lr = warmup_cosine(steps, start=0.0, peak=peak, end=end, warmup=warmup)
            temperature = warmup_cosine(steps, start=cold, peak=warm, end=warm, warmup=rise)
        decay, momentum = (
            cosine_table(steps, base=first, end=last)
            if old
            else warmup_cosine(steps, start=first, peak=first, end=last, warmup=0)
            for first, last in (optim.weight_decay, schedule.momentum)
        )
        frozen = frozen_start(lr, round(schedule.freeze_last_layer * steps))
        self.recipe = recipe
        # Plain doubles: a million steps are 8 MB a table.
        self.lr, self.prototype_lr = array("d", lr), array("d", frozen)
        self.weight_decay, self.momentum = array("d", decay), array("d", momentum)
        self.teacher_temperature = array("d", temperature)

    def at(self, step: int) -> Knobs:
        """All values of a step, counted from 0."""
        recipe = self.recipe
        steps, schedule, objective, gram = (
            recipe.steps,
            recipe.schedule,
            recipe.objective,
            recipe.gram,
        )
        spread = round(schedule.regularizer_warmup * steps)
        spread_share = step / spread if step < spread else 1.0
        return Knobs(
            step=step,
            lr=self.lr[step],
            prototype_lr=self.prototype_lr[step],
            weight_decay=self.weight_decay[step],
            momentum=self.momentum[step],
            teacher_temperature=self.teacher_temperature[step],
            local_weight=ramp(step, schedule.local_ramp, steps, *objective.local_weight),
            regularizer_weight=objective.regularizer_weight * spread_share,
            gram_weight=0.0 if gram is None else gram_weight(step, gram, steps),
        )


def gram_weight(step: int, gram: GramRecipe, steps: int) -> float:
    """Weight of the Gram term: nothing before its teacher is there, then the ramp."""
    begin = (gram.copy_at or 0) if gram.teacher == "ema" else 0
    if step < begin:
        return 0.0
    return ramp(step - begin, gram.ramp, steps, 0.0, gram.weight)


def ramp(step: int, share: float, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` to `end` over a share of the run, then `end`."""
    length = round(share * steps)
    return half_cosine(step, length, start, end) if step < length else end


@dataclass(frozen=True, slots=True)
class Multipliers:
    """How one parameter's rates relate to the schedule's."""

    lr: float
    weight_decay: float
    prototype: bool


def multipliers(
    name: str,
    parameter: nn.Parameter,
    *,
    depth: int = 0,
    layer_decay: float = 1.0,
    patch_embed: float = 1.0,
    decay_rule: Literal["shape", "name"] = "shape",
) -> Multipliers:
    """Rates of a parameter by its name in its own module (backbone or head).

    Layer-wise decay: `layer_decay ** (depth + 1 - layer)` with layer 0 for tokens and patch
    embedding, i + 1 for block i, depth + 1 for the rest. Weight decay by one of two rules:

    * `shape` spares biases, norms, gains and tokens, told by shape and place.
    * `name` is what DINOv3 was trained with: it spares names that end in `bias` or hold `norm` or
      `gamma`, and so decays tokens, prototype gains and ConvNeXt's in-between norms.

    Args:
        name: in the backbone or head.
        parameter: the parameter of that name.
        depth: blocks of the backbone; 0 for everything else, which has no layers.
        layer_decay: rate of a block over that of the next one.
        patch_embed: further factor for a patch embedding.
        decay_rule: who is spared from weight decay.
    """
    layer = depth + 1
    block = re.match(r"blocks\.(\d+)\.", name)
    if block and depth:
        layer = int(block.group(1)) + 1
    elif depth and (name.startswith("patch_embed.") or name in TOKENS):
        layer = 0
    lr = layer_decay ** (depth + 1 - layer)
    if depth and name.startswith("patch_embed."):
        lr *= patch_embed
    if decay_rule == "name":
        spared = name.endswith("bias") or "norm" in name or "gamma" in name
    else:
        spared = parameter.ndim <= 1 or name in TOKENS or name.endswith(GAIN)
    return Multipliers(lr, 0.0 if spared else 1.0, "last_layer" in name)


def parameter_groups(
    modules: dict[str, nn.Module],
    *,
    layer_decay: float,
    patch_embed: float,
    decay_rule: Literal["shape", "name"] = "shape",
) -> list[dict[str, Any]]:
    """AdamW groups of the student: parameters with equal multipliers share one.

    Args:
        modules: `backbone` and the heads. Layer-wise decay acts on backbones with `blocks` (ours).
        layer_decay: rate of a block over that of the next one.
        patch_embed: further factor for our patch embedding.
        decay_rule: who is spared from weight decay, see `multipliers`.
    """
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for module in modules.values():
        depth = (
            len(blocks)
            if isinstance(blocks := getattr(module, "blocks", None), nn.ModuleList)
            else 0
        )
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                key = multipliers(
                    name,
                    parameter,
                    depth=depth,
                    layer_decay=layer_decay,
                    patch_embed=patch_embed,
                    decay_rule=decay_rule,
                )
                groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": key.lr,
            "weight_decay_multiplier": key.weight_decay,
            "prototype": key.prototype,
        }
        for key, parameters in groups.items()
    ]


def set_rates(optimizer: torch.optim.Optimizer, knobs: Knobs) -> None:
    """Writes the step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        lr = knobs.prototype_lr if group["prototype"] else knobs.lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = knobs.weight_decay * group["weight_decay_multiplier"]


def clip(modules: Mapping[str, nn.Module], limit: float | None, *, each: str) -> dict[str, float]:
    """Clips gradients to the norm `limit`; returns each module's norm before that.

    Backbone and heads are clipped each by itself, so that a wild head cannot silence the backbone;
    with `each="tensor"` every tensor is, as in DINO (arXiv 2104.14294). Prototypes that a schedule
    holds at rate 0 count too.
    """
    norms = {}
    bound = float("inf") if limit is None else limit
    for name, module in modules.items():
        held = [p for p in module.parameters() if p.grad is not None]
        if each == "tensor":
            parts = [float(nn.utils.clip_grad_norm_(p, bound)) for p in held]
            norms[name] = math.hypot(*parts)
        else:
            norms[name] = float(nn.utils.clip_grad_norm_(held, bound))
    return norms

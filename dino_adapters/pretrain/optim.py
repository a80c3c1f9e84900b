"""Parameter groups, schedules and clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dino_adapters.pretrain.prototypes import GAIN
from dino_adapters.pretrain.schedules import scaled_rate
from dino_adapters.recipes.pretrain import PretrainRecipe

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


def knobs_at(step: int, recipe: PretrainRecipe) -> Knobs:
    """All scheduled values of a step; a pure function, so that resuming needs no state."""
    optim, schedule, objective = recipe.optim, recipe.schedule, recipe.objective
    old, steps = schedule.family == "v2", recipe.steps
    peak = scaled_rate(optim.lr, optim.batch_size, optim.lr_rule)
    # The older family scales only the peak.
    end = optim.lr_end if old else scaled_rate(optim.lr_end, optim.batch_size, optim.lr_rule)
    lr = warmup_cosine_at(step, steps, peak, end, round(schedule.warmup * steps), old=old)
    cold, warm = objective.teacher_temperature
    rise = round(schedule.temperature_warmup * steps)
    warmed = min(step / max(rise - old, 1), 1.0) if rise else 1.0
    gram = recipe.gram
    return Knobs(
        step=step,
        lr=lr,
        prototype_lr=0.0 if step < round(schedule.freeze_last_layer * steps) else lr,
        weight_decay=warmup_cosine_at(step, steps, *optim.weight_decay, 0, old=old),
        momentum=warmup_cosine_at(step, steps, *schedule.momentum, 0, old=old),
        teacher_temperature=cold + (warm - cold) * warmed,
        local_weight=ramp_at(step, schedule.local_ramp * steps, *objective.local_weight),
        regularizer_weight=objective.regularizer_weight
        * min(step / max(schedule.regularizer_warmup * steps, 1e-9), 1.0)
        if schedule.regularizer_warmup
        else objective.regularizer_weight,
        gram_weight=0.0 if gram is None else ramp_at(step, gram.ramp * steps, 0.0, gram.weight),
    )


def ramp_at(step: int, steps: float, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` from step `steps` on."""
    return half_cosine(step / steps, start, end) if step < steps else end


def half_cosine(progress: float, start: float, end: float) -> float:
    """From `start` at progress 0 to `end` at 1, flat at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def warmup_cosine_at(
    step: int, steps: int, peak: float, end: float, warmup: int, *, old: bool = False
) -> float:
    """One value of `schedules.warmup_cosine` from 0, or with `old` of `schedules.cosine_table`.

    Computed without the table, which a long run would otherwise make for each of its steps.
    """
    if step < warmup:
        return peak * step / max(warmup - old, 1)
    return half_cosine((step - warmup) / max(steps - warmup - (not old), 1), peak, end)


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
) -> list[dict[str, object]]:
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

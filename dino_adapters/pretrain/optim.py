"""Parameter groups, schedules and clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dino_adapters.recipes.pretrain import PretrainRecipe

TOKENS = ("cls_token", "register_tokens", "mask_token", "pos_embed")


@dataclass(frozen=True, slots=True)
class Knobs:
    """What the schedules say for one step."""

    lr: float
    prototype_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


def knobs_at(step: int, recipe: PretrainRecipe) -> Knobs:
    """All scheduled values of a step; a pure function, so that resuming needs no state."""
    optim, schedule = recipe.optim, recipe.schedule
    last = max(recipe.steps - 1, 1)
    lr = warmup_cosine(step, recipe.steps, optim.lr, optim.lr_end, schedule.warmup)
    cold, warm = recipe.objective.teacher_temperature
    rise = max(schedule.temperature_warmup * recipe.steps, 1e-9)
    return Knobs(
        lr=lr,
        prototype_lr=0.0 if step < round(schedule.freeze_last_layer * recipe.steps) else lr,
        weight_decay=half_cosine(step / last, *optim.weight_decay),
        momentum=half_cosine(step / last, *schedule.momentum),
        teacher_temperature=cold + (warm - cold) * min(step / rise, 1.0),
    )


def half_cosine(progress: float, start: float, end: float) -> float:
    """From `start` at progress 0 to `end` at 1, flat at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def warmup_cosine(step: int, steps: int, peak: float, end: float, warmup: float) -> float:
    """Linear rise from 0, reaching `peak` after `warmup * steps`, then half a cosine to `end`."""
    rise = round(warmup * steps)
    if step < rise:
        return peak * step / rise
    return half_cosine((step - rise) / max(steps - 1 - rise, 1), peak, end)


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
) -> Multipliers:
    """Rates of a parameter by its name in its own module (backbone or head).

    Layer-wise decay: `layer_decay ** (depth + 1 - layer)` with layer 0 for tokens and patch
    embedding, i + 1 for block i, depth + 1 for the rest. Weight decay spares biases, norms, gains
    and tokens, told by shape and place rather than by the word `norm`: the reference decays tokens
    and ConvNeXt's in-between norms, though its comments say otherwise.
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
    spared = parameter.ndim <= 1 or name in TOKENS
    return Multipliers(lr, 0.0 if spared else 1.0, "last_layer" in name)


def parameter_groups(
    modules: dict[str, nn.Module], *, layer_decay: float, patch_embed: float
) -> list[dict[str, object]]:
    """AdamW groups of the student: parameters with equal multipliers share one.

    Args:
        modules: `backbone` and the heads. Layer-wise decay acts on backbones with `blocks` (ours).
        layer_decay: rate of a block over that of the next one.
        patch_embed: further factor for our patch embedding.
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
                    name, parameter, depth=depth, layer_decay=layer_decay, patch_embed=patch_embed
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


def clip(modules: Iterable[nn.Module], limit: float | None) -> float:
    """Clips each module's gradients to the norm `limit`; returns the norm of all before that.

    Backbone and heads are clipped each by itself, so that a wild head cannot silence the backbone.
    """
    squares = 0.0
    for module in modules:
        parameters = [p for p in module.parameters() if p.grad is not None]
        bound = float("inf") if limit is None else limit
        squares += float(nn.utils.clip_grad_norm_(parameters, bound)) ** 2
    return math.sqrt(squares)

"""Parameter groups, schedules and clipping."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from dino_adapters.backbones import TimmNetwork
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
from dino_adapters.recipes.teachers import GramRecipe
from dino_adapters.runtime.console import LOGGER

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
    frozen: bool = False
    """Whether the backbone stands still while its new heads learn."""
    backbone_share: float = 1.0
    """Factor on the backbone's learning rate."""
    guides_share: float = 0.0
    """Share of the run since the backbone trains."""


class Timetable:
    """Every scheduled value of a run; nothing in it changes, so that resuming needs no state.

    Args:
        recipe: whose `steps` and `optim.batch_size` are settled.
        pace: factor on all learning rates, below 1 after the run went back.
    """

    def __init__(self, recipe: PretrainRecipe, *, pace: float = 1.0) -> None:
        """Makes the tables of the recipe's family, read in every step."""
        steps, optim, schedule = recipe.steps, recipe.optim, recipe.schedule
        cold, warm = recipe.objective.teacher_temperature
        old = schedule.family == "v2"
        peak = pace * scaled_rate(optim.lr, optim.batch_size, optim.lr_rule)
        warmup, rise = round(schedule.warmup * steps), round(schedule.temperature_warmup * steps)
        if old:  # only the peak is scaled
            lr = cosine_table(steps, base=peak, end=optim.lr_end, warmup=warmup)
            temperature = linear_rise(rise, steps, cold, warm)
        else:
            end = pace * scaled_rate(optim.lr_end, optim.batch_size, optim.lr_rule)
            lr = warmup_cosine(steps, start=0.0, peak=peak, end=end, warmup=warmup)
            temperature = warmup_cosine(steps, start=cold, peak=warm, end=warm, warmup=rise)
        decay, momentum = (
            cosine_table(steps, base=first, end=last)
            if old
            else warmup_cosine(steps, start=first, peak=first, end=last, warmup=0)
            for first, last in (optim.weight_decay, first_and_last_momentum(recipe))
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
        begin = frozen_steps(recipe)
        rise = round(schedule.backbone_ramp * steps)
        moving = max(step - begin, 0)
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
            frozen=step < begin,
            # The first step after the freeze is the first of the ramp, and not at rate 0. Before,
            # nothing of the backbone has a gradient but a patch embedding for new bands.
            backbone_share=min((moving + 1) / (rise + 1), 1.0) if step >= begin else 1.0,
            guides_share=moving / max(steps - begin, 1),
        )


def frozen_steps(recipe: PretrainRecipe) -> int:
    """How many steps the backbone stands still at the start."""
    return round(recipe.schedule.freeze_backbone * recipe.steps)


def first_and_last_momentum(recipe: PretrainRecipe) -> tuple[float, float]:
    """Momentum of the moving average at both ends, the first perhaps from `momentum_span`."""
    schedule = recipe.schedule
    if not schedule.momentum_span:
        return schedule.momentum
    span = max(schedule.momentum_span * recipe.steps, 1.0)
    return 1.0 - 1.0 / span, schedule.momentum[1]


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


@dataclass(frozen=True, slots=True)
class Layers:
    """Where the parameters of a module lie between its input and its output, by their names."""

    above: Mapping[str, int] = field(default_factory=dict)
    """How many layers lie above a parameter's own; 0 where the name is absent."""
    patches: tuple[str, ...] = ()
    """What names of a transformer's patch embedding begin with."""
    tokens: Collection[str] = TOKENS
    """Learned tokens and positions."""


def layers_of(module: nn.Module) -> Layers:
    """Layers of a backbone; a head has none, and neither has our ConvNeXt.

    Transformers, ours and timm's: tokens and patch embedding lie below the first block, final norms
    above the last one. Other networks of timm: their stages, as their `group_matcher` has them; the
    last one, with what follows it, lies above all others.
    """
    if isinstance(module, TimmNetwork):
        return _layers_of_timm(module)
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        return Layers()
    stem = {
        name
        for name, _ in module.named_parameters()
        if name.startswith("patch_embed.") or name in TOKENS
    }
    return Layers(_above(module, len(blocks), stem), ("patch_embed.",))


def _layers_of_timm(network: TimmNetwork) -> Layers:
    from timm.models import group_parameters  # here: our own networks do without it

    inner = network.model
    spared = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
    tokens = {f"model.{name}" for name in (*TOKENS, *spared)}
    if not hasattr(inner, "group_matcher"):
        return Layers(tokens=tokens)
    try:
        matcher = inner.group_matcher(coarse=True)
    except AssertionError:  # how RDNet says that it has no stages to offer, but blocks
        matcher = inner.group_matcher()
    numbers: Any = group_parameters(inner, matcher, reverse=True)
    blocks = getattr(inner, "blocks", None)
    if not network.is_transformer or not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        top = max(numbers.values())
        return Layers({f"model.{name}": top - n for name, n in numbers.items()}, tokens=tokens)
    # timm counts final norms to the last block, and ours lie above it: the blocks are told anew.
    stem = {f"model.{name}" for name, number in numbers.items() if number == 0}
    embeddings = (inner.default_cfg.get("first_conv"), "patch_embed")
    patches = tuple(f"model.{name}." for name in embeddings if isinstance(name, str))
    return Layers(_above(network, len(blocks), stem), patches, tokens)


def _above(module: nn.Module, depth: int, stem: Collection[str]) -> dict[str, int]:
    """Layers above every parameter of a transformer with `depth` blocks."""
    above = dict.fromkeys(stem, depth + 1)
    for name, _ in module.named_parameters():
        if block := re.match(r"(?:model\.)?blocks\.(\d+)\.", name):
            above[name] = depth - int(block.group(1))
    return above


def multipliers(
    name: str,
    parameter: nn.Parameter,
    *,
    layers: Layers,
    layer_decay: float = 1.0,
    patch_embed: float = 1.0,
    decay_rule: Literal["shape", "name"] = "shape",
) -> Multipliers:
    """Rates of a parameter by its name in its own module (backbone or head).

    Layer-wise decay: `layer_decay` to the power of the layers above. Adapters (`lora_a`, `lora_b`)
    are matrices of the block that they are in. Weight decay by one of two rules:

    * `shape` spares biases, norms, gains and tokens, told by shape and place.
    * `name` is what DINOv3 was trained with: it spares names that end in `bias` or hold `norm` or
      `gamma`, and so decays tokens, prototype gains and ConvNeXt's in-between norms.

    Args:
        name: in the backbone or head.
        parameter: the parameter of that name.
        layers: of that backbone or head.
        layer_decay: rate of a block over that of the next one.
        patch_embed: further factor for a patch embedding.
        decay_rule: who is spared from weight decay.
    """
    lr = layer_decay ** layers.above.get(name, 0)
    if name.startswith(layers.patches):
        lr *= patch_embed
    if decay_rule == "name":
        spared = name.endswith("bias") or "norm" in name or "gamma" in name
    else:
        spared = parameter.ndim <= 1 or name in layers.tokens or name.endswith(GAIN)
    return Multipliers(lr, 0.0 if spared else 1.0, "last_layer" in name)


def parameter_groups(
    modules: dict[str, nn.Module],
    *,
    layer_decay: float,
    patch_embed: float,
    decay_rule: Literal["shape", "name"] = "shape",
) -> list[dict[str, Any]]:
    """AdamW groups of the student: parameters with equal multipliers share one.

    What is frozen is in no group. Those of the module `backbone` are marked so, that its rate can
    rise by itself.

    Args:
        modules: `backbone` and the heads.
        layer_decay: rate of a block, or a stage, over that of the next one; see `layers_of`.
        patch_embed: further factor for the patch embedding of a transformer.
        decay_rule: who is spared from weight decay, see `multipliers`.
    """
    groups: dict[tuple[Multipliers, bool], list[nn.Parameter]] = {}
    for label, module in modules.items():
        layers = layers_of(module)
        if isinstance(module, TimmNetwork) and layer_decay < 1.0 and not any(layers.above.values()):
            LOGGER.warning(
                "%s does not say where its layers lie, so that optim.layer_decay cannot act and "
                "all of its weights learn at one rate.",
                module.name,
            )
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                rates = multipliers(
                    name,
                    parameter,
                    layers=layers,
                    layer_decay=layer_decay,
                    patch_embed=patch_embed,
                    decay_rule=decay_rule,
                )
                groups.setdefault((rates, label == "backbone"), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": rates.lr,
            "weight_decay_multiplier": rates.weight_decay,
            "prototype": rates.prototype,
            "backbone": backbone,
        }
        for (rates, backbone), parameters in groups.items()
    ]


def set_rates(optimizer: torch.optim.Optimizer, knobs: Knobs) -> None:
    """Writes the step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        lr = knobs.prototype_lr if group["prototype"] else knobs.lr
        if group["backbone"]:
            lr *= knobs.backbone_share
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
            parts = [number(nn.utils.clip_grad_norm_(p, bound)) for p in held]
            norms[name] = math.hypot(*parts)
        else:
            norms[name] = number(nn.utils.clip_grad_norm_(held, bound))
    return norms


def number(value: Any) -> float:
    """A scalar tensor as a number, also one that is divided over processes."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)

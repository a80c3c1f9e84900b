"""Settings that follow from the number of images: batch size, prototypes, steps.

A recipe says `auto`, or 0, where the data shall decide. The rules are few and meant to be read:
Sinkhorn-Knopp spreads the rows of a batch evenly over K prototypes, so the targets' entropy, and
with it the DINO loss, cannot fall below `log(K / rows)` (arXiv 2508.10104; rows are the global
crops of a batch). A set of N images cannot say what more than N prototypes should be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from dino_adapters.contracts import DataError, RecipeError
from dino_adapters.recipes.pretrain import PretrainRecipe

FEW, MANY = 10_000, 100_000
"""Images up to which batches are small, and up to which they are middling."""
LEAST_BATCH = 8
SMALL_BATCH = 16
LEAST_PROTOTYPES = 64
LOW_FLOOR, HIGH_FLOOR = 1.4, 3.0
"""Largest `log(K / rows)` in nats, up to `FEW` images and above. Measured on 900 images: batches of
32 with K = 256 (floor 1.4) learn; K = 1,024 (2.8) hardly leaves log K in 500 steps."""
PASSES_FEW, PASSES_MANY = 60.0, 10.0
LEAST_STEPS, MOST_STEPS = 300, 100_000
MOST_HELD = 0.5
"""Share of a run in which the backbone may be frozen or below its full rate."""
FRACTIONS = (
    "warmup",
    "freeze_backbone",
    "backbone_ramp",
    "freeze_last_layer",
    "temperature_warmup",
    "momentum_span",
)
"""Fractions of a run that would be lost if they were rounded to no step at all."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a setting has its value, or what speaks against it.

    Attributes:
        key: of the setting, as in overrides: `optim.batch_size`.
        value: what it is now.
        why: the rule that it follows, or the objection.
        warning: the value was given and stays, but something speaks against it.
    """

    key: str
    value: int | float
    why: str
    warning: bool = False

    @property
    def sentence(self) -> str:
        """Setting, value and reason."""
        return f"{self.key} is {self.value:{',' if self.value >= 1 else '.3g'}}: {self.why}."


def resolve(recipe: PretrainRecipe, images: int) -> tuple[PretrainRecipe, tuple[Reason, ...]]:
    """The recipe with everything settled that follows from the number of images.

    * `auto` in `optim.batch_size`, `objective.prototypes` and `steps` gets a number. Phases share
      the numbers of the recipe around them, so that their heads fit; `auto` inside a phase is
      settled for that phase.
    * A fraction of the run below one step (`FRACTIONS`) becomes one step.
    * Values that were given stay, with a warning where something speaks against them.

    What is settled already stays, so resolving twice changes nothing.

    Args:
        recipe: with or without phases.
        images: how many the run reads, those of its split alone.

    Returns:
        The recipe, checked anew, and a reason for each value that was set, then the warnings.

    Raises:
        DataError: there are no images.
        RecipeError: the settled numbers do not fit the rest of the recipe, or the backbone is held
            back for more than half of a run: as both shares are 0 unless given, neither is
            shortened behind the back of who gave them.
    """
    if images < 1:
        raise DataError(f"There are {images} images. Name a folder or a split that holds some.")
    if not recipe.phases:
        changes, reasons = _settled(recipe, images)
        return _changed(recipe, changes, images), _in_order(reasons)
    inherited = any(phase.steps is None for phase in recipe.phases)
    changes, reasons = _counts(recipe, images, with_steps=inherited)
    recipe = _changed(recipe, changes, images)
    settled = {(reason.key, reason.value) for reason in reasons}
    phases, said = [], set()
    for phase, (_, plan) in zip(recipe.phases, recipe.plans(), strict=True):
        own, more = _settled(plan, images)
        phases.append(_over(phase.model_dump(), own))
        for reason in more:
            mark = (reason.key, reason.why)
            if mark in said or (reason.key, reason.value) in settled:
                continue  # an earlier phase said it, or it is the rule's own choice
            said.add(mark)
            shared = _value(recipe, reason.key) == reason.value
            key = reason.key if shared else f"phases.{phase.name}.{reason.key}"
            reasons.append(replace(reason, key=key))
    return _changed(recipe, {"phases": phases}, images), _in_order(reasons)


def batch_size_for(images: int) -> int:
    """A power of two: 64, 256 or 1,024, at most a quarter of the images, at least 8."""
    usual = 64 if images <= FEW else 256 if images <= MANY else 1024
    return max(LEAST_BATCH, min(usual, _power_of_two(images // 4)))


def prototypes_for(images: int, rows: int) -> int:
    """The largest K, a power of two, whose floor is low enough; at most `images`, at least 64.

    Args:
        images: how many the run reads.
        rows: global crops of a batch, which Sinkhorn-Knopp balances together.
    """
    most = rows * math.exp(LOW_FLOOR if images <= FEW else HIGH_FLOOR)
    return max(LEAST_PROTOTYPES, _power_of_two(min(int(most), images)))


def passes_for(images: int) -> float:
    """How often each image is seen: 60 times up to 1,000 images, 10 from a million on."""
    share = min(max(math.log10(images / 1e3) / 3, 0.0), 1.0)
    return PASSES_FEW + share * (PASSES_MANY - PASSES_FEW)


def steps_for(images: int, batch_size: int) -> int:
    """Steps for so many passes, rounded to two digits, from 300 to 100,000."""
    exact = passes_for(images) * images / batch_size
    unit = 10 ** max(math.floor(math.log10(max(exact, 1.0))) - 1, 0)
    return min(max(round(exact / unit) * unit, LEAST_STEPS), MOST_STEPS)


def loss_floor(prototypes: int, rows: int) -> float:
    """The least entropy in nats of targets that use K prototypes evenly: `log(K / rows)`, from 0.

    Args:
        prototypes: K.
        rows: how many are balanced together.
    """
    return max(math.log(prototypes / rows), 0.0)


def _power_of_two(limit: int) -> int:
    """The largest one up to `limit`; 1 for less."""
    return 1 << (max(limit, 1).bit_length() - 1)


def _settled(recipe: PretrainRecipe, images: int) -> tuple[dict[str, Any], list[Reason]]:
    """Changes to one phase, and what is said about it."""
    changes, reasons = _counts(recipe, images, with_steps=True)
    numbers = _changed(recipe, changes, images)
    _check_held(numbers)
    shares = {}
    for name in FRACTIONS:
        share = getattr(numbers.schedule, name)
        if share > 0 and round(share * numbers.steps) == 0:
            shares[name] = 1 / numbers.steps
            said = f"{share:g} of {numbers.steps:,} steps is less than one step, so it is one"
            reasons.append(Reason(f"schedule.{name}", shares[name], said))
    if shares:
        changes["schedule"] = shares
    return changes, reasons + list(_warnings(recipe, images))


def _counts(
    recipe: PretrainRecipe, images: int, *, with_steps: bool
) -> tuple[dict[str, Any], list[Reason]]:
    """Numbers for whatever is `auto`."""
    changes: dict[str, Any] = {}
    reasons: list[Reason] = []
    batch = recipe.optim.batch_size
    if not batch:
        batch = batch_size_for(images)
        changes["optim"] = {"batch_size": batch}
        reasons.append(Reason("optim.batch_size", batch, _why_batch(batch, images)))
    if not recipe.objective.prototypes:
        rows = batch * recipe.crops.global_count
        count = prototypes_for(images, rows)
        changes["objective"] = {"prototypes": count}
        reasons.append(Reason("objective.prototypes", count, _why_prototypes(count, rows, images)))
    if not recipe.steps and with_steps:
        steps = steps_for(images, batch)
        changes["steps"] = steps
        reasons.append(Reason("steps", steps, _why_steps(steps, batch, images)))
    return changes, reasons


def _why_batch(batch: int, images: int) -> str:
    if batch == LEAST_BATCH:
        few = "small for Sinkhorn-Knopp and KoLeo, which look within a batch"
        if batch > images:
            return f"the least there is, though an image repeats within a batch: {few}"
        if batch * 4 > images:
            return f"the least there is, more than a quarter of {images:,} images: {few}"
        return f"a quarter of {images:,} images at most: {few}"
    if batch < 64:
        return f"at most a quarter of {images:,} images"
    if images <= FEW:
        return f"it suits up to {FEW:,} images, and there are {images:,}"
    if images <= MANY:
        return f"it suits {FEW:,} to {MANY:,} images, and there are {images:,}"
    return f"it suits more than {MANY:,} images, and there are {images:,}"


def _why_prototypes(count: int, rows: int, images: int) -> str:
    floor = f"the DINO loss can fall to {loss_floor(count, rows):.1f}"
    if count > images:
        return f"the least there is, though more than the {images:,} images; {floor}"
    if count > rows * math.exp(LOW_FLOOR if images <= FEW else HIGH_FLOOR):
        return f"the least there is; with {rows:,} global crops a batch {floor}"
    if 2 * count > images:
        return f"not more than the {images:,} images; {floor}"
    return f"for {images:,} images and {rows:,} global crops a batch; {floor}"


def _why_steps(steps: int, batch: int, images: int) -> str:
    passes = f"{steps * batch / images:.0f} passes over {images:,} images"
    if steps == LEAST_STEPS:
        return f"the least that schedules need: {passes}"
    if steps == MOST_STEPS:
        return f"the most that is chosen unasked: {passes}"
    return f"about {passes}"


def _warnings(recipe: PretrainRecipe, images: int) -> Iterator[Reason]:
    """What speaks against values that were given; a distillation takes the teacher's heads."""
    batch, count = recipe.optim.batch_size, recipe.objective.prototypes
    sinkhorn = recipe.objective.centering == "sinkhorn"
    judged = recipe.distill is None and recipe.objective.dino_weight > 0
    if batch > images:
        said = f"an image repeats within a batch, as there are {images:,}"
        yield Reason("optim.batch_size", batch, said, warning=True)
    o = recipe.objective
    among = ["Sinkhorn-Knopp"] if sinkhorn else []
    among += ["KoLeo"] if o.regularizer == "koleo" and o.regularizer_weight > 0 else []
    if 0 < batch < SMALL_BATCH and among and recipe.distill is None:
        verb = "looks" if len(among) == 1 else "look"
        said = f"{' and '.join(among)} {verb} within a batch and will see few images"
        yield Reason("optim.batch_size", batch, said, warning=True)
    if count > images and judged:
        said = f"there are {images:,} images, so most prototypes cannot be told apart"
        yield Reason("objective.prototypes", count, said, warning=True)
    rows = (batch or batch_size_for(images)) * recipe.crops.global_count
    if count and judged and sinkhorn and loss_floor(count, rows) > HIGH_FLOOR:
        said = (
            f"the DINO loss cannot fall below log(K / {rows:,}) = {loss_floor(count, rows):.1f}: "
            f"take fewer prototypes, such as {prototypes_for(images, rows):,}, or larger batches"
        )
        yield Reason("objective.prototypes", count, said, warning=True)


def _check_held(recipe: PretrainRecipe) -> None:
    """Refuses a run that holds the backbone back for most of it; heads alone may be trained.

    Raises:
        RecipeError: with both shares.
    """
    frozen, ramp = recipe.schedule.freeze_backbone, recipe.schedule.backbone_ramp
    if frozen == 1.0 and ramp == 0.0:
        return  # a phase for the heads
    if frozen + ramp > MOST_HELD:
        raise RecipeError(
            f"schedule.freeze_backbone is {frozen:g} and schedule.backbone_ramp {ramp:g} of the "
            f"run, together more than {MOST_HELD:g}. Lower them, so that the backbone has half of "
            "the run at its full rate, or set them to 1 and 0 to train heads alone."
        )


def _value(recipe: PretrainRecipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _over(told: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A phase as it was told, with changes written over its sections."""
    for key, value in changes.items():
        told[key] = {**told[key], **value} if isinstance(value, Mapping) else value
    return told


def _changed(recipe: PretrainRecipe, changes: Mapping[str, Any], images: int) -> PretrainRecipe:
    """The recipe with changes, checked anew now that its numbers are known."""
    if not changes:
        return recipe
    try:
        return recipe.changed(changes)
    except ValidationError as error:
        found = "; ".join(str(e["msg"]).removeprefix("Value error, ") for e in error.errors())
        raise RecipeError(f"For {images:,} images, what was auto does not fit: {found}") from error


def _in_order(reasons: list[Reason]) -> tuple[Reason, ...]:
    return tuple(sorted(reasons, key=lambda reason: reason.warning))

"""PretrainRecipe: everything that a pretraining run is told. Frozen; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dino_adapters.recipes.continuing import AnchorRecipe, GuideRecipe, LoraRecipe
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.recipes.running import GateRecipe, GuardRecipe, MonitorRecipe, ParallelRecipe
from dino_adapters.recipes.sections import (
    CheckpointRecipe,
    Count,
    CropsRecipe,
    MasksRecipe,
    ModelRecipe,
    ObjectiveRecipe,
    OptimRecipe,
    ScheduleRecipe,
    Section,
)
from dino_adapters.recipes.teachers import DistillRecipe, GramRecipe
from dino_adapters.runtime.chance import derive

OFF_OR_SAME = ("gram", "lora", "anchor")
"""Sections that a phase keeps unless told otherwise, None being off."""


class PhaseRecipe(Section):
    """One phase: its name, what it starts from, and what it changes in the recipe around it."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Used for its folder and by later phases."""
    start: Literal["fresh", "state", "teacher"] | None = None
    """`fresh` is from `model`; `teacher` takes the teacher of the phase before as student and
    teacher, with a fresh optimiser; `state` takes its whole state with the optimiser. None is
    `teacher`, but in the first phase and in a distillation `fresh`. Schedules of rate, temperature
    and momentum begin anew in every phase: to go on where the last one ended, set their values."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; None is the recipe's."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's section of this name."""
    crops: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's section of this name."""
    masks: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's section of this name."""
    objective: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's section of this name."""
    gram: dict[str, Any] | Literal["same"] | None = "same"
    """Changes to the recipe's section of this name; given, even empty, it turns Gram on. None is
    off."""
    distill: dict[str, Any] | None = None
    """Makes this phase a distillation."""
    lora: dict[str, Any] | Literal["same"] | None = "same"
    """Changes to the recipe's section of this name, as of `gram`."""
    anchor: dict[str, Any] | Literal["same"] | None = "same"
    """Changes to the recipe's section of this name, as of `gram`."""
    optim: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's section of this name."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's section of this name."""
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's section of this name."""


class PretrainRecipe(Section):
    """One pretraining run."""

    data: DataRecipe
    """The images."""
    split: str | None = None
    """A split (JSON or CSV) of these images: only its training part is read."""
    model: ModelRecipe = ModelRecipe()
    """The network."""
    crops: CropsRecipe = CropsRecipe()
    """The views."""
    masks: MasksRecipe = MasksRecipe()
    """The hidden patches."""
    objective: ObjectiveRecipe = ObjectiveRecipe()
    """The loss."""
    gram: GramRecipe | None = None
    """Gram anchoring; None is off."""
    distill: DistillRecipe | None = None
    """Distillation from a frozen teacher, in place of self-distillation."""
    lora: LoraRecipe | None = None
    """Low-rank adapters; None trains all weights."""
    anchor: AnchorRecipe | None = None
    """Ties class tokens to those of the start; None does not."""
    guides: tuple[GuideRecipe, ...] = ()
    """Columns of `data.metadata` that attract or repel."""
    optim: OptimRecipe = OptimRecipe()
    """The optimiser."""
    schedule: ScheduleRecipe = ScheduleRecipe()
    """The run in time."""
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    """What is kept."""
    monitor: MonitorRecipe = MonitorRecipe()
    """What is watched."""
    gate: GateRecipe | None = None
    """Deliver the start, unless the result is shown to be better; None delivers the result."""
    guard: GuardRecipe = GuardRecipe()
    """What happens to steps that are not finite."""
    parallel: ParallelRecipe = ParallelRecipe()
    """How a step is divided."""
    steps: Count = 1000
    """Optimiser steps of the whole run; `auto` follows the number of images."""
    seed: int = Field(default=0, ge=0)
    """Same seed, same weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; weights and losses are fp32. auto: bf16 on CUDA, fp32 on CPU."""
    imports: tuple[str, ...] = ()
    """Modules imported before names are looked up, for networks and readers of your own."""
    phases: tuple[PhaseRecipe, ...] = ()
    """Phases run in order, each one this recipe with its changes; none: the recipe is the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gram is not None and self.distill is not None:
            raise ValueError(
                "gram and distill are both given, and a distillation has no Gram term. Take one "
                "of them out; in phases, set gram=None in the distillation"
            )
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"The phases are called {', '.join(names)}. Give each its own name")
        if self.phases:
            self.plans()  # each phase is checked with what it changes
        else:
            self._check_gram()
            self._check_koleo()
        return self

    def _check_gram(self) -> None:
        if self.gram is None:
            return
        if self.steps and self.gram.copy_at is not None and self.gram.copy_at >= self.steps:
            raise ValueError(
                f"gram.copy_at is {self.gram.copy_at} and there are {self.steps} steps. Give a "
                "step of the run, counted from 0"
            )
        if self.gram.teacher == "live" and any(m.gram_size for m in self.crops.mixture):
            raise ValueError(
                "gram_size is given in crops.mixture, and with gram.teacher=live the moving "
                "average's own tokens are used. Leave it out, or set gram.teacher=ema"
            )
        if self.gram.size is not None and self.crops.mixture:
            raise ValueError(
                "gram.size is given beside crops.mixture, which holds a gram_size for each of its "
                "entries. Leave gram.size out"
            )

    def _check_koleo(self) -> None:
        o, batch = self.objective, self.optim.batch_size
        if o.regularizer != "koleo":
            return
        if not batch:
            return  # decided with the number of images
        if o.koleo_group is not None and batch % o.koleo_group:
            raise ValueError(
                f"objective.koleo_group is {o.koleo_group} and optim.batch_size is {batch}. Give a "
                "group that divides the batch"
            )
        among = o.koleo_group or batch
        if o.koleo_neighbours >= max(among, 2):
            raise ValueError(
                f"objective.koleo_neighbours is {o.koleo_neighbours} among {among} images. Give "
                "fewer neighbours, or a larger batch or group"
            )

    def changed(self, changes: Mapping[str, Any]) -> PretrainRecipe:
        """This recipe with changes written over it, those of a section over that section.

        A table inside a section, such as `model.architecture`, is replaced as a whole.

        Raises:
            pydantic.ValidationError: a change names a setting that does not exist, or misfits.
        """
        told = self.model_dump()
        for key, value in changes.items():
            before = told.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                told[key] = {**before, **value}
            else:
                told[key] = value
        return PretrainRecipe.model_validate(told)

    def plans(self) -> tuple[tuple[PhaseRecipe, PretrainRecipe], ...]:
        """Each phase, its start settled, with the complete recipe that it amounts to.

        Phases after the first get seeds of their own, so that none repeats the crops of another.

        Raises:
            pydantic.ValidationError: a change names a setting that does not exist, or misfits.
        """
        base = self.model_copy(update={"phases": ()})
        plans = []
        for index, phase in enumerate(self.phases):
            told = phase.model_dump(exclude={"name", "start", *OFF_OR_SAME}, exclude_none=True)
            own = {name: getattr(phase, name) for name in OFF_OR_SAME}
            changes = told | {name: value for name, value in own.items() if value != "same"}
            if index:
                changes["seed"] = derive(self.seed, "phase", index)
            try:
                plan = base.changed(changes)
            except ValidationError as error:
                raise _inside(error, "phases", phase.name) from None
            usual = "teacher" if index and plan.distill is None else "fresh"
            plans.append((phase.model_copy(update={"start": phase.start or usual}), plan))
        return tuple(plans)


def _inside(error: ValidationError, *place: str) -> ValidationError:
    """The same errors, found in a part of a recipe."""
    lines: list[Any] = [
        {
            "type": details["type"],
            "loc": (*place, *details["loc"]),
            "input": details["input"],
            "ctx": details.get("ctx", {}),
        }
        for details in error.errors()
    ]
    return ValidationError.from_exception_data(error.title, lines)

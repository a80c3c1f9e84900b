"""Distillation: students learn from a frozen teacher (DINOv3, arXiv 2508.10104, section 5.2).

One forward pass of the teacher serves all students. A student sees every patch, also at the places
where iBOT compares; its moving average is kept beside it and delivered. With a teacher that has no
heads, students imitate its features instead: see `imitate`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_adapters.contracts import Network, RecipeError
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import autocast, move_average
from dino_adapters.pretrain.objective import (
    Balance,
    Learning,
    Losses,
    Teaching,
    Tensors,
    class_tokens,
    heads_of,
    learn,
    make_networks,
    teach,
    terms,
)
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.pretrain.ranks import ALONE, Ranks
from dino_adapters.pretrain.spread import Pull
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.runtime.chance import derive

TEACHER = ""  # no student is called that


@dataclass(frozen=True, slots=True)
class Lesson:
    """One step before its backward pass: the sum, and each student's part."""

    losses: Losses
    teacher: Teaching
    students: dict[str, Learning]


class Distillation:
    """A frozen teacher with its heads, and one or several students.

    Args:
        teacher: `backbone`, `dino_head` and, unless shared, `ibot_head`; never changed.
        backbones: the students' networks by name.
        objective: weights, heads and temperatures; K must be the teacher's.
        seed: of the students' heads.
        device: where all live.
        bf16: run the networks under bf16 autocast.
        ranks: who shares the batch.
    """

    def __init__(
        self,
        teacher: nn.ModuleDict,
        backbones: dict[str, nn.Module],
        objective: ObjectiveRecipe,
        *,
        seed: int,
        device: torch.device,
        bf16: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.objective, self.device, self.bf16, self.ranks = objective, device, bf16, ranks
        self.with_ibot = objective.ibot_weight > 0
        self.balance = Balance(objective, ranks)
        self.teacher = teacher.to(device).requires_grad_(False).eval()
        self.students = {
            name: make_networks(backbone, objective, seed=derive(seed, name)).to(device).train()
            for name, backbone in backbones.items()
        }
        self.averages = frozen_copies(self.students)

    def before(self, step: int) -> None:
        """Nothing."""

    def losses(self, crops: Crops, knobs: Knobs) -> Losses:
        """The students' summed objective; the terms carry their names."""
        return self.step(crops, knobs).losses

    def step(self, crops: Crops, knobs: Knobs) -> Lesson:
        """A whole batch at once, with what it was made from.

        Args:
            crops: the views at the largest size that a network takes; they are reduced for others.
            knobs: temperatures and weights of the step.

        Raises:
            RecipeError: a student's grid is not the teacher's.
        """
        return self.compare(crops, self.teach([crops], knobs)[0], knobs)

    def teach(self, parts: Sequence[Crops], knobs: Knobs) -> list[Teaching]:
        """The teacher's targets for every micro-batch."""
        size = crop_sizes(parts[0], self.teacher, self.students)[TEACHER][0]
        own = [replace(p, global_crops=resized(p.global_crops, size)) for p in parts]
        with autocast(self.device, self.bf16):
            return teach(
                self.teacher, own, self.balance, knobs.teacher_temperature, ibot=self.with_ibot
            )

    def compare(
        self, part: Crops, taught: Teaching, knobs: Knobs, pulls: Mapping[str, Pull] | None = None
    ) -> Lesson:
        """What the students make of a micro-batch, held against its targets."""
        sizes = crop_sizes(part, self.teacher, self.students)
        seen, parts = {}, {}
        for name, networks in self.students.items():
            own = fitted(part, sizes[name])
            with autocast(self.device, self.bf16):
                seen[name] = learn(networks, own, hide=False)
            check_grids(name, seen[name].grid, taught.grid)
            pull = None if pulls is None else pulls[name]
            parts[name] = terms(
                self.objective, seen[name], taught, own, knobs, ranks=self.ranks, pull=pull
            )
        return Lesson(summed(parts), taught, seen)

    @torch.no_grad()
    def class_tokens(self, part: Crops) -> dict[str, Tensor]:
        """See `Learner.class_tokens`."""
        sizes, found = crop_sizes(part, self.teacher, self.students), {}
        for name, networks in self.students.items():
            with autocast(self.device, self.bf16):
                found[name] = class_tokens(networks, fitted(part, sizes[name]), hide=False)
        return found

    def after(self, knobs: Knobs) -> None:
        """Moves every student's average, and the centres."""
        self.balance.move()
        for name, average in self.averages.items():
            move_average(average, self.students[name], knobs.momentum)

    def forget(self) -> None:
        """Drops new centres."""
        self.balance.forget()

    def networks(self) -> dict[str, nn.ModuleDict]:
        """Students, their averages and the teacher."""
        return all_networks(self.students, self.averages) | {"teacher": self.teacher}

    def remember_start(self) -> None:
        """Nothing: no anchor holds on to it."""

    def heads(self, name: str) -> Tensors:
        """The student's heads; centres are the teacher's and stay with it."""
        return heads_of(self.averages[name])

    def state(self) -> dict[str, Any]:
        """Students, their averages and centres; the teacher never changes."""
        return states(self.students, self.averages) | {"centers": dict(self.balance.centers)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()` in place."""
        load_states(state, self.students, self.averages)
        self.balance.start(state["centers"], self.device)


def check_grids(name: str, grid: tuple[int, int], teacher: tuple[int, int]) -> None:
    """Refuses to compare patches that lie elsewhere.

    Raises:
        RecipeError: the grids differ.
    """
    if grid != teacher:
        raise RecipeError(
            f"The student {name} makes {grid[0]} x {grid[1]} patches and the teacher "
            f"{teacher[0]} x {teacher[1]}. Choose crops.global_size so that both divide it alike."
        )


def crop_sizes(
    crops: Crops, teacher: nn.ModuleDict, students: dict[str, nn.ModuleDict]
) -> dict[str, tuple[int, int]]:
    """Global and local crop size of each network, so that all have the same grid.

    The crops come at the size of the coarsest patch; a network with patches half as large gets them
    half as large.
    """
    patch = {name: _patch(networks) for name, networks in students.items()}
    patch[TEACHER] = _patch(teacher)
    largest = max(patch.values())
    whole = crops.global_crops.shape[-1]
    local = 0 if crops.local_crops is None else crops.local_crops.shape[-1]
    return {name: (whole * p // largest, local * p // largest) for name, p in patch.items()}


def _patch(networks: nn.ModuleDict) -> int:
    return cast(Network, networks["backbone"]).patch_size


def fitted(crops: Crops, sizes: tuple[int, int]) -> Crops:
    """The same views at other sizes."""
    local = None if crops.local_crops is None else resized(crops.local_crops, sizes[1])
    return replace(crops, global_crops=resized(crops.global_crops, sizes[0]), local_crops=local)


def resized(images: Tensor, size: int) -> Tensor:
    """Smaller squares `(B, C, size, size)`, antialiased; unchanged at their own size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


def summed(parts: dict[str, Losses]) -> Losses:
    """All students' losses in one: their totals added, their terms named `STUDENT/TERM`."""
    named = {
        f"{name}/{term}" if name else term: value
        for name, losses in parts.items()
        for term, value in losses.terms.items()
    }
    return Losses(torch.stack([losses.total for losses in parts.values()]).sum(), named)


def frozen_copies(students: dict[str, nn.ModuleDict]) -> dict[str, nn.ModuleDict]:
    """Moving averages as they start: copies in eval mode."""
    return {
        name: copy.deepcopy(networks).requires_grad_(False).eval()
        for name, networks in students.items()
    }


def all_networks(
    students: dict[str, nn.ModuleDict], averages: dict[str, nn.ModuleDict]
) -> dict[str, nn.ModuleDict]:
    """Both, each by a name of its own."""
    return {f"students/{name}": networks for name, networks in students.items()} | {
        f"averages/{name}": networks for name, networks in averages.items()
    }


def states(
    students: dict[str, nn.ModuleDict], averages: dict[str, nn.ModuleDict]
) -> dict[str, Any]:
    """State dicts by student."""
    return {
        "students": {name: networks.state_dict() for name, networks in students.items()},
        "averages": {name: networks.state_dict() for name, networks in averages.items()},
    }


def load_states(
    state: dict[str, Any], students: dict[str, nn.ModuleDict], averages: dict[str, nn.ModuleDict]
) -> None:
    """Restores `states()` in place."""
    for name in students:
        students[name].load_state_dict(state["students"][name])
        averages[name].load_state_dict(state["averages"][name])

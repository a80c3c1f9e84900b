"""Distillation: students learn from a frozen teacher (DINOv3, arXiv 2508.10104, section 5.2).

One forward pass of the teacher serves all students. A student sees every patch, also at the places
where iBOT compares; its moving average is kept beside it and delivered. With a teacher that has no
heads, students imitate its features instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_adapters.contracts import Network, RecipeError
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import autocast, move_average
from dino_adapters.pretrain.losses import exact
from dino_adapters.pretrain.objective import (
    Balance,
    Learning,
    Losses,
    Teaching,
    Tensors,
    heads_of,
    learn,
    make_networks,
    teach,
    terms,
)
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.runtime.chance import derive, generator

STATISTICS_MOMENTUM = 0.99
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
    ) -> None:
        self.objective, self.device, self.bf16 = objective, device, bf16
        self.with_ibot = objective.ibot_weight > 0
        self.balance = Balance(objective)
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
        """One step, with what it was made from.

        Args:
            crops: the views at the largest size that a network takes; they are reduced for others.
            knobs: temperatures and weights of the step.

        Raises:
            RecipeError: a student's grid is not the teacher's.
        """
        sizes = crop_sizes(crops, self.teacher, self.students)
        with autocast(self.device, self.bf16):
            teacher = teach(
                self.teacher,
                resized(crops.global_crops, sizes[TEACHER][0]),
                crops.masks if self.with_ibot else None,
                crops.images,
                self.balance,
                knobs.teacher_temperature,
            )
        seen, parts = {}, {}
        for name, networks in self.students.items():
            own = fitted(crops, sizes[name])
            with autocast(self.device, self.bf16):
                seen[name] = learn(networks, own, hide=False)
            check_grids(name, seen[name].grid, teacher.grid)
            parts[name] = terms(self.objective, seen[name], teacher, own, knobs)
        return Lesson(summed(parts), teacher, seen)

    def after(self, knobs: Knobs) -> None:
        """Moves every student's average, and the centres."""
        self.balance.move()
        for name, average in self.averages.items():
            move_average(average, self.students[name], knobs.momentum)

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


class FeatureDistillation:
    """Students imitate the features of any frozen network.

    `L = mean (1 - cos(A_cls cls_s, cls_t)) + mean_patches (1 - cos(A_patch p_s, p_t))` with linear
    maps A of each student, against features that are standardised per channel by running
    statistics, so that no large channel rules (as Theia, arXiv 2407.20179, standardises them).

    Args:
        teacher: a frozen network with a feature map.
        backbones, seed, device, bf16: as for `Distillation`; no term of the objective is used.
    """

    with_ibot = False

    def __init__(
        self,
        teacher: nn.Module,
        backbones: dict[str, nn.Module],
        *,
        seed: int,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.device, self.bf16 = device, bf16
        self.teacher = nn.ModuleDict({"backbone": teacher}).to(device)
        self.teacher.requires_grad_(False).eval()
        width = cast(Network, teacher).embed_dim
        self.students: dict[str, nn.ModuleDict] = {}
        for name, backbone in backbones.items():
            parts = {"backbone": backbone}
            for index, map_name in enumerate(("cls_map", "patch_map")):
                linear = nn.Linear(cast(Network, backbone).embed_dim, width)
                nn.init.trunc_normal_(
                    linear.weight, std=0.02, generator=generator(seed, f"maps/{name}", index)
                )
                nn.init.zeros_(linear.bias)
                parts[map_name] = linear
            self.students[name] = nn.ModuleDict(parts).to(device).train()
        self.averages = frozen_copies(self.students)
        # Mean and mean square of each channel, for class tokens and patches.
        self.statistics = {
            part: torch.zeros(2, width, device=device) for part in ("cls", "patches")
        }
        self._next: dict[str, Tensor] = {}
        self.updates = 0

    def before(self, step: int) -> None:
        """Nothing."""

    def losses(self, crops: Crops, knobs: Knobs) -> Losses:
        """The students' summed objective over the global crops; the terms carry their names."""
        sizes = crop_sizes(crops, self.teacher, self.students)
        with torch.no_grad(), autocast(self.device, self.bf16):
            taught = self.teacher["backbone"](resized(crops.global_crops, sizes[TEACHER][0]))
        cls = self._standardised("cls", taught.cls)
        patches = self._standardised("patches", taught.patches)
        parts = {}
        for name, networks in self.students.items():
            with autocast(self.device, self.bf16):
                images = resized(crops.global_crops, sizes[name][0])
                seen = cast(Network, networks["backbone"]).forward_crops([images], [None])[0]
                check_grids(name, seen.grid, taught.grid)
                own_cls = networks["cls_map"](seen.cls)
                own_patches = networks["patch_map"](seen.patches)
            zero = own_cls.new_zeros(())
            losses = Losses(zero, {}).plus("cls", cosine_gap(own_cls, cls), 1.0)
            parts[name] = losses.plus("patches", cosine_gap(own_patches, patches), 1.0)
        return summed(parts)

    def after(self, knobs: Knobs) -> None:
        """Moves every student's average, and the teacher's statistics."""
        self.statistics, self.updates = self._next, self.updates + 1
        self._next = {}
        for name, average in self.averages.items():
            move_average(average, self.students[name], knobs.momentum)

    def heads(self, name: str) -> Tensors:
        """None: the linear maps serve this teacher's features alone."""
        return {}

    def state(self) -> dict[str, Any]:
        """Students, their averages and the teacher's statistics."""
        kept = {"statistics": dict(self.statistics), "updates": self.updates}
        return states(self.students, self.averages) | kept

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()` in place."""
        load_states(state, self.students, self.averages)
        self.statistics = {k: v.to(self.device) for k, v in state["statistics"].items()}
        self.updates = int(state["updates"])

    @torch.no_grad()
    def _standardised(self, part: str, features: Tensor) -> Tensor:
        values = exact(features)
        flat = values.flatten(0, -2)
        now = torch.stack([flat.mean(dim=0), flat.square().mean(dim=0)])
        kept = self.statistics[part].lerp(now, 1 - STATISTICS_MOMENTUM)
        self._next[part] = kept
        mean, square = kept / (1 - STATISTICS_MOMENTUM ** (self.updates + 1))
        return (values - mean) / (square - mean.square()).clamp(min=1e-6).sqrt()


def cosine_gap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean of `1 - cos` over all rows `(..., D)`."""
    return (1 - F.cosine_similarity(exact(ours), exact(theirs), dim=-1)).mean()


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

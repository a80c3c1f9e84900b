"""Self-distillation: a student learns from the moving average of itself (arXiv 2508.10104)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_adapters.contracts import Network
from dino_adapters.pretrain.anchor import GramAnchor
from dino_adapters.pretrain.augment import Crops
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
from dino_adapters.recipes.sections import GramRecipe, ObjectiveRecipe


class Learner(Protocol):
    """What the training loop asks of a method."""

    device: torch.device
    students: dict[str, nn.ModuleDict]
    """Networks that are trained, by name; the name is empty where there is only one."""
    averages: dict[str, nn.ModuleDict]
    """Their moving averages, which are delivered."""
    with_ibot: bool

    def before(self, step: int) -> None:
        """What happens before a step."""
        ...

    def losses(self, crops: Crops, knobs: Knobs) -> Losses:
        """The objective of one step."""
        ...

    def after(self, knobs: Knobs) -> None:
        """What happens once the optimiser has stepped: moving average, then Gram refresh."""
        ...

    def heads(self, name: str) -> Tensors:
        """What is delivered beside the average of this name: its heads; empty without any."""
        ...

    def state(self) -> dict[str, Any]:
        """All tensors that training changes."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()` in place."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One step before its backward pass: losses, and what they were made from."""

    losses: Losses
    teacher: Teaching
    student: Learning
    gram: Tensor | None


class SelfDistillation:
    """Student, teacher, Gram teacher, and the loss between them.

    Args:
        backbone: the student's network; the teacher starts as its copy.
        objective: weights, heads and temperatures.
        seed: of the heads' start.
        device: where all live.
        bf16: run the networks under bf16 autocast; weights and losses stay fp32.
        gram: the Gram section, or None.
        gram_network: the Gram teacher's backbone, where it is not the moving average.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objective: ObjectiveRecipe,
        *,
        seed: int,
        device: torch.device,
        bf16: bool,
        gram: GramRecipe | None = None,
        gram_network: nn.Module | None = None,
    ) -> None:
        self.device, self.bf16 = device, bf16
        self.with_ibot = cast(Network, backbone).supports_masks and objective.ibot_weight > 0
        if not self.with_ibot:
            objective = objective.model_copy(update={"ibot_weight": 0.0})
        self.objective, self.balance = objective, Balance(objective)
        self.student = make_networks(backbone, objective, seed=seed).to(device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.students, self.averages = {"": self.student}, {"": self.teacher}
        self.gram: GramAnchor | None = None
        if gram is not None:
            network = None if gram_network is None else gram_network.to(device)
            self.gram = GramAnchor(gram, network, self.teacher["backbone"])

    def before(self, step: int) -> None:
        """The Gram teacher is copied from the moving average, if this is its step."""
        if self.gram is not None:
            self.gram.before(step)

    def losses(self, crops: Crops, knobs: Knobs) -> Losses:
        """The objective of one step; see `objective`."""
        return self.step(crops, knobs).losses

    def step(self, crops: Crops, knobs: Knobs) -> Step:
        """The objective of one step, with what it was made from.

        Args:
            crops: the views.
            knobs: temperatures and weights of the step.
        """
        with autocast(self.device, self.bf16):
            teacher = teach(
                self.teacher,
                crops.global_crops,
                crops.masks if self.with_ibot else None,
                crops.images,
                self.balance,
                knobs.teacher_temperature,
            )
            student = learn(self.student, crops, hide=True)
        losses = terms(self.objective, student, teacher, crops, knobs)
        tokens = None
        if self.gram is not None and knobs.gram_weight > 0:
            with autocast(self.device, self.bf16):
                tokens = self.gram.tokens(crops, teacher, student.grid)
            value = self.gram.loss(student, tokens, crops.masks)
            losses = losses.plus("gram", value, knobs.gram_weight)
        return Step(losses, teacher, student, tokens)

    def after(self, knobs: Knobs) -> None:
        """Moving averages, then the Gram teacher's refresh, if it is due."""
        self.balance.move()
        move_average(self.teacher, self.student, knobs.momentum)
        if self.gram is not None:
            self.gram.after(knobs.step)

    def heads(self, name: str) -> Tensors:
        """The teacher's heads, with the centres of its targets."""
        return heads_of(self.averages[name], self.balance.centers)

    def state(self) -> dict[str, Any]:
        """All tensors that training changes."""
        state: dict[str, Any] = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "centers": dict(self.balance.centers),
        }
        if self.gram is not None and self.gram.network is not None:
            state["gram"] = self.gram.network.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()` in place; a Gram teacher only where both have one."""
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.balance.start(state["centers"], self.device)
        if self.gram is not None and self.gram.network is not None and "gram" in state:
            self.gram.network.load_state_dict(state["gram"])


@torch.no_grad()
def move_average(average: nn.Module, student: nn.Module, momentum: float) -> None:
    """`average = m * average + (1 - m) * student`, parameters only."""
    theirs: list[Tensor] = list(average.parameters())
    ours: list[Tensor] = list(student.parameters())
    get_ema_multi_avg_fn(momentum)(theirs, ours, 0)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """bf16 products in the networks; weights, losses and averages stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

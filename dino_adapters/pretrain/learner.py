"""Self-distillation: a student learns from the moving average of itself (arXiv 2508.10104)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_adapters.contracts import Network
from dino_adapters.pretrain.anchor import GramAnchor, class_gap
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.guides import Guides
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
from dino_adapters.recipes.continuing import AnchorRecipe
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.recipes.teachers import GramRecipe

GUIDES = "guides"


class Learner(Protocol):
    """What the training loop asks of a method."""

    device: torch.device
    ranks: Ranks
    objective: ObjectiveRecipe
    students: dict[str, nn.ModuleDict]
    """Networks that are trained, by name; the name is empty where there is only one."""
    averages: dict[str, nn.ModuleDict]
    """Their moving averages, which are delivered."""
    with_ibot: bool

    def before(self, step: int) -> None:
        """What happens before a step."""
        ...

    def teach(self, parts: Sequence[Crops], knobs: Knobs) -> list[Any]:
        """What the students shall learn from each micro-batch, balanced over all of them."""
        ...

    def compare(
        self, part: Crops, taught: Any, knobs: Knobs, pulls: Mapping[str, Pull] | None = None
    ) -> Any:
        """A micro-batch before its backward pass; `.losses` is the objective of it."""
        ...

    def class_tokens(self, part: Crops) -> dict[str, Tensor]:
        """Class tokens `(G, b, D)` of global crops that `compare` will see, without gradient.

        Empty where no regularizer looks at them.
        """
        ...

    def after(self, knobs: Knobs) -> None:
        """What happens once the optimiser has stepped: moving average, then Gram refresh."""
        ...

    def forget(self) -> None:
        """Drops what `teach` and `compare` keep for `after`: the step was refused."""
        ...

    def heads(self, name: str) -> Tensors:
        """What is delivered beside the average of this name: its heads; empty without any."""
        ...

    def networks(self) -> dict[str, nn.ModuleDict]:
        """All networks by a name of their own, those that never change too."""
        ...

    def remember_start(self) -> None:
        """Takes the networks as they are now for the start that an anchor holds on to."""
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
        anchor: ties class tokens to those of the start, or None.
        guides: what is known of the images, or None.
        ranks: who shares the batch.
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
        anchor: AnchorRecipe | None = None,
        guides: Guides | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.device, self.bf16, self.ranks = device, bf16, ranks
        self.with_ibot = cast(Network, backbone).supports_masks and objective.ibot_weight > 0
        if not self.with_ibot:
            objective = objective.model_copy(update={"ibot_weight": 0.0})
        self.objective, self.balance = objective, Balance(objective, ranks)
        self.student = make_networks(backbone, objective, seed=seed).to(device).train()
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False).eval()
        # Guides are no part of what is averaged and delivered.
        self.guides = guides
        if guides is not None:
            self.student[GUIDES] = guides.to(device)
        self.students, self.averages = {"": self.student}, {"": self.teacher}
        self.anchor = anchor
        self.start: nn.Module | None = None
        if anchor is not None or (gram is not None and gram.teacher == "start"):
            self.start = copy.deepcopy(self.teacher["backbone"])
        self.gram: GramAnchor | None = None
        if gram is not None:
            network = self.start if gram_network is None else gram_network.to(device)
            self.gram = GramAnchor(gram, network, self.teacher["backbone"])

    def before(self, step: int) -> None:
        """The Gram teacher is copied from the moving average, if this is its step."""
        if self.gram is not None:
            self.gram.before(step)

    def losses(self, crops: Crops, knobs: Knobs) -> Losses:
        """The objective of one step; see `objective`."""
        return self.step(crops, knobs).losses

    def step(self, crops: Crops, knobs: Knobs) -> Step:
        """The objective of a whole batch at once, with what it was made from.

        Args:
            crops: the views.
            knobs: temperatures and weights of the step.
        """
        return self.compare(crops, self.teach([crops], knobs)[0], knobs)

    def teach(self, parts: Sequence[Crops], knobs: Knobs) -> list[Teaching]:
        """The teacher's targets for every micro-batch; see `objective.teach`."""
        with autocast(self.device, self.bf16):
            taught = teach(
                self.teacher, parts, self.balance, knobs.teacher_temperature, ibot=self.with_ibot
            )
        if self.guides is not None:
            for part, teaching in zip(parts, taught, strict=True):
                self.guides.note_teacher(teaching.cls, part.targets)
            self.guides.agree(self.ranks)
        return taught

    def compare(
        self, part: Crops, taught: Teaching, knobs: Knobs, pulls: Mapping[str, Pull] | None = None
    ) -> Step:
        """What the student makes of a micro-batch, held against its targets."""
        with autocast(self.device, self.bf16):
            student = learn(self.student, part, hide=True)
        pull = None if pulls is None else pulls[""]
        losses = terms(self.objective, student, taught, part, knobs, ranks=self.ranks, pull=pull)
        start = None
        if self.start is not None:
            with torch.no_grad(), autocast(self.device, self.bf16):
                start = self.start(part.global_crops)
        if self.anchor is not None and start is not None:
            value = class_gap(student.cls, start.cls)
            losses = losses.plus("anchor", value, self.anchor.cls_weight)
        tokens = None
        if self.gram is not None and knobs.gram_weight > 0:
            with autocast(self.device, self.bf16):
                tokens = self.gram.tokens(part, taught, student.grid, start)
            value = self.gram.loss(student, tokens, part.masks)
            losses = losses.plus("gram", value, knobs.gram_weight)
        if self.guides is not None:
            total, each = self.guides.total(student.cls, part.targets, knobs.guides_share)
            losses = Losses(losses.total + total, losses.terms | each)
        return Step(losses, taught, student, tokens)

    @torch.no_grad()
    def class_tokens(self, part: Crops) -> dict[str, Tensor]:
        """See `Learner.class_tokens`."""
        with autocast(self.device, self.bf16):
            return {"": class_tokens(self.student, part, hide=True)}

    def after(self, knobs: Knobs) -> None:
        """Moving averages, then the Gram teacher's refresh, if it is due."""
        self.balance.move()
        if self.guides is not None:
            self.guides.after(self.ranks)
        move_average(self.teacher, self.student, knobs.momentum)
        if self.gram is not None:
            self.gram.after(knobs.step)

    def forget(self) -> None:
        """Drops new centres and what the guides noted."""
        self.balance.forget()
        if self.guides is not None:
            self.guides.forget()

    def heads(self, name: str) -> Tensors:
        """The teacher's heads, with the centres of its targets."""
        return heads_of(self.averages[name], self.balance.centers)

    def networks(self) -> dict[str, nn.ModuleDict]:
        """Student, teacher, and those that it is held against."""
        found = {"student": self.student, "teacher": self.teacher}
        if self.start is not None:
            found["start"] = nn.ModuleDict({"backbone": self.start})
        if self.gram is not None and self.gram.network not in (None, self.start):
            found["gram"] = nn.ModuleDict({"backbone": self.gram.network})
        return found

    @torch.no_grad()
    def remember_start(self) -> None:
        """See `Learner.remember_start`."""
        if self.start is not None:
            self.start.load_state_dict(self.teacher["backbone"].state_dict())

    def state(self) -> dict[str, Any]:
        """All tensors that training changes, and those of the start."""
        state: dict[str, Any] = {
            name: networks.state_dict() for name, networks in self.networks().items()
        }
        return state | {"centers": dict(self.balance.centers)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()` in place; start and Gram teacher only where both have them."""
        for name, networks in self.networks().items():
            if name in state or name in ("student", "teacher"):
                networks.load_state_dict(state[name])
        self.balance.start(state["centers"], self.device)


@torch.no_grad()
def move_average(average: nn.Module, student: nn.Module, momentum: float) -> None:
    """`average = m * average + (1 - m) * student`, parameters only.

    Parameters that the average shares with the student (frozen ones) are left alone; so are those
    of the student that the average lacks.
    """
    ours = dict(student.named_parameters())
    pairs = [
        (shard(theirs), shard(ours[name]))
        for name, theirs in average.named_parameters()
        if theirs is not ours[name]
    ]
    if pairs:
        theirs: list[Tensor] = [average for average, _ in pairs]
        own: list[Tensor] = [student for _, student in pairs]
        get_ema_multi_avg_fn(momentum)(theirs, own, 0)


def shard(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided over devices; whole tensors as they are."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """bf16 products in the networks; weights, losses and averages stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

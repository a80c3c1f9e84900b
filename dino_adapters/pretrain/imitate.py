"""Distillation from a teacher without heads: students imitate its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_adapters.contracts import Features, Network
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.distill import (
    TEACHER,
    all_networks,
    check_grids,
    crop_sizes,
    frozen_copies,
    load_states,
    resized,
    states,
    summed,
)
from dino_adapters.pretrain.learner import autocast, move_average
from dino_adapters.pretrain.losses import exact
from dino_adapters.pretrain.objective import Losses, Tensors
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.pretrain.ranks import ALONE, Ranks
from dino_adapters.pretrain.spread import Pull
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.runtime.chance import generator

STATISTICS_MOMENTUM = 0.99


@dataclass(frozen=True, slots=True)
class Imitation:
    """One step of feature distillation before its backward pass."""

    losses: Losses


class FeatureDistillation:
    """Students imitate the features of any frozen network.

    `L = mean (1 - cos(A_cls cls_s, cls_t)) + mean_patches (1 - cos(A_patch p_s, p_t))` with linear
    maps A of each student, against features that are standardised per channel by running
    statistics, so that no large channel rules (as Theia, arXiv 2407.20179, standardises them).

    Args:
        teacher: a frozen network with a feature map.
        backbones, seed, device, bf16, ranks: as for `Distillation`; no term of the objective is
            used.
    """

    with_ibot = False
    objective = ObjectiveRecipe(regularizer="none")

    def __init__(
        self,
        teacher: nn.Module,
        backbones: dict[str, nn.Module],
        *,
        seed: int,
        device: torch.device,
        bf16: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.device, self.bf16, self.ranks = device, bf16, ranks
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
        return self.compare(crops, self.teach([crops], knobs)[0], knobs).losses

    @torch.no_grad()
    def teach(self, parts: Sequence[Crops], knobs: Knobs) -> list[Features]:
        """The teacher's standardised features of every micro-batch."""
        size = crop_sizes(parts[0], self.teacher, self.students)[TEACHER][0]
        with autocast(self.device, self.bf16):
            seen = [self.teacher["backbone"](resized(p.global_crops, size)) for p in parts]
        cls = self._standardised("cls", [features.cls for features in seen])
        patches = self._standardised("patches", [features.patches for features in seen])
        return [
            replace(features, cls=own, patches=maps)
            for features, own, maps in zip(seen, cls, patches, strict=True)
        ]

    def compare(
        self, part: Crops, taught: Features, knobs: Knobs, pulls: Mapping[str, Pull] | None = None
    ) -> Imitation:
        """How far the students are from the teacher's features of a micro-batch."""
        sizes, parts = crop_sizes(part, self.teacher, self.students), {}
        for name, networks in self.students.items():
            with autocast(self.device, self.bf16):
                images = resized(part.global_crops, sizes[name][0])
                seen = cast(Network, networks["backbone"]).forward_crops([images], [None])[0]
                check_grids(name, seen.grid, taught.grid)
                own_cls = networks["cls_map"](seen.cls)
                own_patches = networks["patch_map"](seen.patches)
            zero = own_cls.new_zeros(())
            losses = Losses(zero, {}).plus("cls", cosine_gap(own_cls, taught.cls), 1.0)
            value = cosine_gap(own_patches, taught.patches)
            parts[name] = losses.plus("patches", value, 1.0)
        return Imitation(summed(parts))

    def class_tokens(self, part: Crops) -> dict[str, Tensor]:
        """None: no regularizer looks at them."""
        return {}

    def after(self, knobs: Knobs) -> None:
        """Moves every student's average, and the teacher's statistics."""
        self.statistics, self.updates = self._next, self.updates + 1
        self._next = {}
        for name, average in self.averages.items():
            move_average(average, self.students[name], knobs.momentum)

    def forget(self) -> None:
        """Drops new statistics."""
        self._next = {}

    def networks(self) -> dict[str, nn.ModuleDict]:
        """Students, their averages and the teacher."""
        return all_networks(self.students, self.averages) | {"teacher": self.teacher}

    def remember_start(self) -> None:
        """Nothing: no anchor holds on to it."""

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

    def _standardised(self, part: str, features: Sequence[Tensor]) -> list[Tensor]:
        values = [exact(tokens) for tokens in features]
        rows = torch.cat([tokens.flatten(0, -2) for tokens in values])
        # Every rank brings equally many rows.
        now = torch.stack([rows.mean(dim=0), rows.square().mean(dim=0)])
        now = self.ranks.sum(now) / self.ranks.size
        kept = self.statistics[part].lerp(now, 1 - STATISTICS_MOMENTUM)
        self._next[part] = kept
        mean, square = kept / (1 - STATISTICS_MOMENTUM ** (self.updates + 1))
        scale = (square - mean.square()).clamp(min=1e-6).sqrt()
        return [(tokens - mean) / scale for tokens in values]


def cosine_gap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean of `1 - cos` over all rows `(..., D)`."""
    return (1 - F.cosine_similarity(exact(ours), exact(theirs), dim=-1)).mean()

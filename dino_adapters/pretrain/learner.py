"""Self-distillation: a student learns from the moving average of itself (DINOv3, section 3)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_adapters.contracts import Network
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.losses import dino_loss, ibot_loss, koleo_loss
from dino_adapters.pretrain.masks import mask_weights
from dino_adapters.pretrain.prototypes import ProjectionHead
from dino_adapters.pretrain.targets import sinkhorn_knopp
from dino_adapters.recipes.pretrain import ObjectiveRecipe
from dino_adapters.runtime.chance import generator


@dataclass(frozen=True, slots=True)
class Losses:
    """The total that is differentiated, and its unweighted terms; None where a term is not used."""

    total: Tensor
    dino_global: Tensor
    dino_local: Tensor | None
    ibot: Tensor | None
    koleo: Tensor

    def numbers(self) -> dict[str, float]:
        """Names and values for logs, of the terms that are used."""
        terms = {
            "loss": self.total,
            "dino_global": self.dino_global,
            "dino_local": self.dino_local,
            "ibot": self.ibot,
            "koleo": self.koleo,
        }
        return {name: term.item() for name, term in terms.items() if term is not None}


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher says of one step: dino `(G, B, K)`; ibot `(M, K')` or None."""

    dino: Tensor
    ibot: Tensor | None


class SelfDistillation:
    """Student and teacher, and the loss between them.

    Args:
        backbone: the student's network; the teacher starts as its copy.
        objective: weights, heads and temperatures.
        seed: of the heads' start.
        device: where both live.
        bf16: run the networks under bf16 autocast; weights and losses stay fp32.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objective: ObjectiveRecipe,
        *,
        seed: int,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.objective, self.device, self.bf16 = objective, device, bf16
        network = cast(Network, backbone)
        self.with_ibot = network.supports_masks and objective.ibot_weight > 0
        parts: dict[str, nn.Module] = {
            "backbone": backbone,
            "dino_head": self._head(network.embed_dim, objective.prototypes),
        }
        if self.with_ibot:
            prototypes = objective.ibot_prototypes or objective.prototypes
            parts["ibot_head"] = self._head(network.embed_dim, prototypes)
        for index, head in enumerate(list(parts.values())[1:]):
            cast(ProjectionHead, head).reset_parameters(
                generator(seed, "heads", index), prototype_norm=objective.prototype_norm
            )
        self.student = nn.ModuleDict(parts).to(device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()

    def _head(self, embed_dim: int, prototypes: int) -> ProjectionHead:
        o = self.objective
        return ProjectionHead(
            embed_dim, prototypes, hidden_dim=o.hidden_dim, bottleneck_dim=o.bottleneck_dim
        )

    def losses(self, crops: Crops, temperature: float) -> Losses:
        """The objective of one step.

        `L = w_dino (s_g L_global + s_l L_local) + w_ibot L_ibot + w_koleo Σ_global KoLeo`; the
        shares s_g and s_l are those of the retained pairs of crops.

        Args:
            crops: the views.
            temperature: the teacher's, from its schedule.
        """
        o = self.objective
        targets = self.targets(crops, temperature)
        count = crops.images
        views = len(crops.global_crops) // count
        groups = [crops.global_crops]
        if crops.local_crops is not None:
            groups.append(crops.local_crops)
        with self._autocast():
            backbone = cast(Network, self.student["backbone"])
            features = backbone.forward_crops(groups, [crops.masks, None][: len(groups)])
            logits = self.student["dino_head"](torch.cat([f.cls for f in features]))
        global_logits = logits[: views * count].unflatten(0, (views, count))
        local_logits = logits[views * count :].unflatten(0, (-1, count))

        temp = o.student_temperature
        dino_global = dino_loss(global_logits, targets.dino, temperature=temp, drop_diagonal=True)
        pairs = [dino_global] * (views * (views - 1))
        dino_local = ibot = None
        if len(local_logits):
            dino_local = dino_loss(local_logits, targets.dino, temperature=temp)
            pairs += [dino_local] * (views * len(local_logits))
        # Every pair of crops weighs the same, whether global or local.
        dino = torch.stack(pairs).mean()
        koleo = torch.stack([koleo_loss(cls) for cls in features[0].cls.chunk(views)])
        total = o.dino_weight * dino + o.koleo_weight * koleo.sum()
        if targets.ibot is not None and crops.masks is not None:
            with self._autocast():
                masked = self.student["ibot_head"](features[0].patches[crops.masks])
            weights = mask_weights(crops.masks)
            ibot = ibot_loss(masked, targets.ibot, weights, len(crops.masks), temperature=temp)
            total = total + o.ibot_weight * ibot
        return Losses(total, dino_global, dino_local, ibot, koleo.mean())

    @torch.no_grad()
    def targets(self, crops: Crops, temperature: float) -> Targets:
        """Balanced assignments of the unmasked global crops by the teacher."""
        o = self.objective
        views = len(crops.global_crops) // crops.images
        with self._autocast():
            features = self.teacher["backbone"](crops.global_crops)
            logits = self.teacher["dino_head"](features.cls)
        dino = sinkhorn_knopp(logits, temperature=temperature, rounds=o.sinkhorn_rounds)
        dino = dino.unflatten(0, (views, crops.images))
        if not self.with_ibot or crops.masks is None:
            return Targets(dino, None)
        with self._autocast():
            masked = self.teacher["ibot_head"](features.patches[crops.masks])
        ibot = sinkhorn_knopp(masked, temperature=temperature, rounds=o.sinkhorn_rounds)
        return Targets(dino, ibot)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """`teacher = m * teacher + (1 - m) * student`, parameters only."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        get_ema_multi_avg_fn(momentum)(teacher, student, 0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

"""The objective of one step (DINOv3, arXiv 2508.10104, section 3), term by term.

    L = w_dino (s_g L_DINO,global + s_l w_local(t) L_DINO,local) + w_ibot L_iBOT
        + w_spread(t) Σ_global crops L_spread + w_gram(t) L_Gram

`teach` says what the teacher makes of the global crops, `learn` what the student makes of all of
them, `terms` compares the two. L_Gram is added by `learner.SelfDistillation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dino_adapters.contracts import Features, Network
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.losses import dino_loss, exact, ibot_loss
from dino_adapters.pretrain.masks import mask_weights
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.pretrain.prototypes import ProjectionHead
from dino_adapters.pretrain.ranks import ALONE, Ranks
from dino_adapters.pretrain.spread import Pull, spread
from dino_adapters.pretrain.targets import sinkhorn_knopp, softmax_centering, update_center
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.runtime.chance import generator

Tensors = dict[str, Tensor]
CENTER = "center."


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a teacher makes of one step's global crops.

    Attributes:
        cls: class tokens `(G, B, D)`.
        patches: patch tokens `(G * B, N, D)`.
        grid: patches per column and row.
        logits: class-token scores `(G, B, K)`.
        dino: balanced targets `(G, B, K)`.
        ibot: balanced targets of masked patches `(M, K')`, or None.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]
    logits: Tensor
    dino: Tensor
    ibot: Tensor | None


@dataclass(frozen=True, slots=True)
class Learning:
    """What a student makes of one step's crops.

    Attributes:
        cls: class tokens of global crops `(G, B, D)`.
        patches: their patch tokens `(G * B, N, D)`.
        grid: patches per column and row.
        logits: their class-token scores `(G, B, K)`.
        local_cls, local_patches, local_logits: the same of local crops, or None.
        ibot: scores of masked patches `(M, K')`, or None.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]
    logits: Tensor
    local_cls: Tensor | None
    local_patches: Tensor | None
    local_logits: Tensor | None
    ibot: Tensor | None


@dataclass(frozen=True, slots=True)
class Losses:
    """The total that is differentiated, and its unweighted terms by name, those that are used."""

    total: Tensor
    terms: dict[str, Tensor]

    def plus(self, name: str, value: Tensor, weight: float) -> Losses:
        """These losses and one more term."""
        return Losses(self.total + weight * value, self.terms | {name: value})

    def numbers(self) -> dict[str, float]:
        """Names and values for logs."""
        return {"loss": self.total.item()} | {k: v.item() for k, v in self.terms.items()}


def make_networks(backbone: nn.Module, objective: ObjectiveRecipe, *, seed: int) -> nn.ModuleDict:
    """A backbone with its heads: `dino_head`, and `ibot_head` where the term is on.

    With `shared_head` the first serves both terms.
    """
    o = objective
    widths = {"dino_head": (o.prototypes, o.hidden_dim, o.bottleneck_dim)}
    if o.ibot_weight > 0 and not o.shared_head:
        widths["ibot_head"] = (
            o.ibot_prototypes or o.prototypes,
            o.ibot_hidden_dim or o.hidden_dim,
            o.ibot_bottleneck_dim or o.bottleneck_dim,
        )
    networks: dict[str, nn.Module] = {"backbone": backbone}
    for index, (name, (prototypes, hidden, bottleneck)) in enumerate(widths.items()):
        head = ProjectionHead(
            cast(Network, backbone).embed_dim,
            prototypes,
            hidden_dim=hidden,
            bottleneck_dim=bottleneck,
            layers=o.head_layers,
            weight_norm=o.weight_norm,
        )
        head.reset_parameters(generator(seed, "heads", index), prototype_norm=o.prototype_norm)
        networks[name] = head
    return nn.ModuleDict(networks)


def ibot_head(networks: nn.ModuleDict) -> nn.Module:
    """The head of masked patches."""
    return networks["ibot_head" if "ibot_head" in networks else "dino_head"]


def heads_of(networks: nn.ModuleDict, centers: Mapping[str, Tensor] | None = None) -> Tensors:
    """Tensors of the heads, `HEAD.NAME`, and of the centres, `center.TERM`, for one file."""
    found = {
        f"{name}.{key}": tensor
        for name, module in networks.items()
        if name.endswith("_head")
        for key, tensor in module.state_dict().items()
    }
    return found | {f"{CENTER}{term}": center for term, center in (centers or {}).items()}


class Balance:
    """Turns the teacher's scores into targets, by Sinkhorn-Knopp or about a moving centre.

    Attributes:
        centers: `(1, K)` per term, of softmax centering; empty with Sinkhorn-Knopp.
    """

    def __init__(self, objective: ObjectiveRecipe, ranks: Ranks = ALONE) -> None:
        self.objective, self.ranks = objective, ranks
        self.centers: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def __call__(self, term: str, logits: Tensor, temperature: float) -> Tensor:
        """Targets `(B, K)` of logits `(B, K)`."""
        o = self.objective
        if o.centering == "sinkhorn":
            return sinkhorn_knopp(
                logits, temperature=temperature, rounds=o.sinkhorn_rounds, ranks=self.ranks
            )
        center = self.centers.get(term)
        if center is None:
            center = exact(logits).new_zeros(1, logits.shape[1])
        targets = softmax_centering(logits, center, temperature=temperature)
        self._next[term] = update_center(
            center, logits, momentum=o.center_momentum, ranks=self.ranks
        )
        return targets

    def start(self, centers: Mapping[str, Tensor], device: torch.device) -> None:
        """Begins from these centres, where targets are centred at all."""
        if self.objective.centering == "softmax":
            self.centers = {term: center.to(device) for term, center in centers.items()}

    def move(self) -> None:
        """Moves the centres; after the step, so that a step which is refused leaves them alone."""
        self.centers |= self._next
        self._next = {}

    def forget(self) -> None:
        """Leaves the centres of a refused step out."""
        self._next = {}


@torch.no_grad()
def teach(
    networks: nn.ModuleDict,
    parts: Sequence[Crops],
    balance: Balance,
    temperature: float,
    *,
    ibot: bool,
) -> list[Teaching]:
    """The teacher's view of the global crops, which it sees without masks.

    Scores of all micro-batches are balanced together, so that their targets are those of the whole
    batch.

    Args:
        networks: backbone and heads, in eval mode.
        parts: the micro-batches.
        balance: turns scores into targets.
        temperature: divides the scores.
        ibot: make targets for masked patches.
    """
    seen, scores, hidden = [], [], []
    for part in parts:
        features = networks["backbone"](part.global_crops)
        seen.append(features)
        scores.append(networks["dino_head"](features.cls))
        if ibot and part.masks is not None:
            hidden.append(ibot_head(networks)(features.patches[part.masks]))
    dino = balance("dino", torch.cat(scores), temperature).split([len(rows) for rows in scores])
    patches: Sequence[Tensor | None] = [None] * len(parts)
    if hidden:
        targets = balance("ibot", torch.cat(hidden), temperature)
        patches = targets.split([len(rows) for rows in hidden])
    return [
        Teaching(
            cls=features.cls.unflatten(0, (-1, part.images)),
            patches=features.patches,
            grid=features.grid,
            logits=logits.unflatten(0, (-1, part.images)),
            dino=own.unflatten(0, (-1, part.images)),
            ibot=own_patches,
        )
        for part, features, logits, own, own_patches in zip(
            parts, seen, scores, dino, patches, strict=True
        )
    ]


def see(networks: nn.ModuleDict, crops: Crops, *, hide: bool) -> list[Features]:
    """What a student's backbone makes of the global crops, and of the local ones if there are any.

    Args:
        networks: with the backbone, in train mode.
        crops: the views.
        hide: whether the masked patches are hidden from it.
    """
    groups = [crops.global_crops]
    if crops.local_crops is not None:
        groups.append(crops.local_crops)
    hidden = [crops.masks if hide else None, None][: len(groups)]
    return cast(Network, networks["backbone"]).forward_crops(groups, hidden)


def class_tokens(networks: nn.ModuleDict, crops: Crops, *, hide: bool) -> Tensor:
    """Class tokens `(G, B, D)` of the global crops, as `learn` will see them.

    Local crops go along, as all crops of a step share the network's draws.
    """
    return see(networks, crops, hide=hide)[0].cls.unflatten(0, (-1, crops.images))


def learn(networks: nn.ModuleDict, crops: Crops, *, hide: bool) -> Learning:
    """The student's view of all crops.

    Args:
        networks: backbone and heads, in train mode.
        crops: the views; with masks, iBOT's scores are made at the masked patches.
        hide: whether the masked patches are hidden from the student; not in distillation.
    """
    views, images = len(crops.global_crops) // crops.images, crops.images
    features = see(networks, crops, hide=hide)
    logits = networks["dino_head"](torch.cat([f.cls for f in features]))
    count = views * images
    ibot = None
    if crops.masks is not None:
        ibot = ibot_head(networks)(features[0].patches[crops.masks])
    local = features[1] if len(features) > 1 else None
    return Learning(
        cls=features[0].cls.unflatten(0, (views, images)),
        patches=features[0].patches,
        grid=features[0].grid,
        logits=logits[:count].unflatten(0, (views, images)),
        local_cls=local.cls.unflatten(0, (-1, images)) if local else None,
        local_patches=local.patches if local else None,
        local_logits=logits[count:].unflatten(0, (-1, images)) if local else None,
        ibot=ibot,
    )


def terms(
    objective: ObjectiveRecipe,
    student: Learning,
    teacher: Teaching,
    crops: Crops,
    knobs: Knobs,
    *,
    ranks: Ranks = ALONE,
    pull: Pull | None = None,
) -> Losses:
    """All terms but Gram's, and their weighted sum.

    The shares s_g and s_l are those of the pairs of crops that are compared, so that every pair
    weighs the same.

    Args:
        objective: weights and options.
        student: what the student makes of the crops.
        teacher: what the teacher does.
        crops: the views, for their masks.
        knobs: the step's weights.
        ranks: who shares the batch.
        pull: what the regularizer asks, where it looks beyond these crops.
    """
    o, views = objective, len(student.logits)
    temp = o.student_temperature
    dino_global = dino_loss(
        student.logits, teacher.dino, temperature=temp, drop_diagonal=o.drop_diagonal
    )
    found = {"dino_global": dino_global}
    pairs_global = views * (views - 1) if o.drop_diagonal else views * views
    pairs_local = 0 if student.local_logits is None else views * len(student.local_logits)
    share = pairs_global / (pairs_global + pairs_local)
    dino = share * dino_global
    if student.local_logits is not None:
        found["dino_local"] = dino_loss(student.local_logits, teacher.dino, temperature=temp)
        dino = dino + (1 - share) * knobs.local_weight * found["dino_local"]
    losses = Losses(o.dino_weight * dino, found)
    if student.ibot is not None and teacher.ibot is not None and crops.masks is not None:
        weights = mask_weights(crops.masks)
        value = ibot_loss(student.ibot, teacher.ibot, weights, len(crops.masks), temperature=temp)
        losses = losses.plus("ibot", value, o.ibot_weight)
    if o.regularizer != "none":
        if pull is None:
            value = spread(o, student.cls, knobs.step, ranks=ranks, kin=crops.kin)
        else:
            value = pull.on(student.cls)
        losses = losses.plus(o.regularizer, value, views * knobs.regularizer_weight)
    return losses

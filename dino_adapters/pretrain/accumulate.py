"""Forward and backward of one step, whole or in micro-batches, with the gradients of the whole.

What couples images sees all of them: targets are balanced over all micro-batches, masks were made
for the whole batch, and a regularizer that looks beyond a micro-batch first sees the class tokens
of all (one more forward pass), and then tells each token its gradient (GradCache, arXiv
2101.06983). Only drop path and rotary draws differ, as each forward pass draws its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import Learner
from dino_adapters.pretrain.objective import Losses
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.pretrain.spread import Pull, looks_beyond, spread


def accumulate(
    learner: Learner,
    crops: Crops,
    knobs: Knobs,
    *,
    micro_batch: int | None = None,
    seed_draws: Callable[[int], None] = lambda part: None,
) -> Losses:
    """Adds the gradients of one step to the parameters.

    Args:
        learner: the method.
        crops: all views of this device.
        knobs: temperatures and weights of the step.
        micro_batch: images that go through the networks at once; None is all.
        seed_draws: ties the networks' own draws to the number of a micro-batch; called before each
            forward pass.

    Returns:
        The losses of the whole batch, without gradient.
    """
    parts = crops.parts(micro_batch)
    taught = learner.teach(parts, knobs)
    pulls = regularized(learner, parts, knobs, seed_draws)
    found = []
    for index, (part, lesson) in enumerate(zip(parts, taught, strict=True)):
        seed_draws(index)
        pull = None if pulls is None else pulls[index]
        losses = learner.compare(part, lesson, knobs, pull).losses
        share = part.images / crops.images
        (share * losses.total).backward()
        found.append((share, losses))
    return added(found)


def regularized(
    learner: Learner, parts: Sequence[Crops], knobs: Knobs, seed_draws: Callable[[int], None]
) -> list[dict[str, Pull]] | None:
    """What a regularizer over all micro-batches asks of each; None where each is its own batch."""
    objective = learner.objective
    if len(parts) == 1 or not any(looks_beyond(objective, part.images) for part in parts):
        return None
    tokens: dict[str, list[Tensor]] = {}
    for index, part in enumerate(parts):
        seed_draws(index)
        for name, cls in learner.class_tokens(part).items():
            tokens.setdefault(name, []).append(cls)
    kin = None if parts[0].kin is None else torch.cat([p.kin for p in parts if p.kin is not None])
    images = [part.images for part in parts]
    pulls: list[dict[str, Pull]] = [{} for _ in parts]
    for name, pieces in tokens.items():
        whole = torch.cat(pieces, dim=1).requires_grad_()
        value = spread(objective, whole, knobs.step, ranks=learner.ranks, kin=kin)
        (gradient,) = torch.autograd.grad(value, whole)
        for index, own in enumerate(gradient.split(images, dim=1)):
            pulls[index][name] = Pull(value.detach(), own * (sum(images) / images[index]))
    return pulls


def added(found: Sequence[tuple[float, Losses]]) -> Losses:
    """Means of the micro-batches' losses, weighted by their shares of the batch."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        weighted = [share * x.detach() for (share, _), x in zip(found, values, strict=True)]
        return torch.stack(weighted).sum()

    total = mean(losses.total for _, losses in found)
    names = found[0][1].terms
    return Losses(total, {name: mean(losses.terms[name] for _, losses in found) for name in names})

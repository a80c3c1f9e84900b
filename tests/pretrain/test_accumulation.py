"""Micro-batches add up to the large batch, if what looks across images sees all of it.

Sinkhorn-Knopp has to balance the teacher's scores of all micro-batches at once, masks have to be
made for the whole batch, and KoLeo's groups have to stay inside a micro-batch.
"""

import random
from dataclasses import replace

import pytest
import torch

from dino_adapters.backbones import build_network
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.masks import block_masks
from dino_adapters.pretrain.objective import Balance, learn, teach, terms
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.pretrain.targets import sinkhorn_knopp
from dino_adapters.recipes.sections import ObjectiveRecipe

SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 1, "rope_rescale": None, "layerscale": 1.0}
IMAGES, MICRO, LOCALS, TEMPERATURE = 8, 2, 3, 0.04
KNOBS = Knobs(0, 1e-3, 1e-3, 0.04, 0.9, TEMPERATURE, local_weight=0.7, regularizer_weight=0.3)


def learner():
    network, _ = build_network("vitmicro8", architecture=SMALL, seed=1)
    told = ObjectiveRecipe(
        prototypes=12, hidden_dim=16, bottleneck_dim=8, prototype_norm=1.0, koleo_group=MICRO
    )
    made = SelfDistillation(network, told, seed=0, device=torch.device("cpu"), bf16=False)
    for networks in (made.student, made.teacher):
        networks.double()
    with torch.no_grad():  # a teacher of its own
        for parameter in made.teacher.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
    return made


def whole_batch():
    draws = torch.Generator().manual_seed(2)
    return Crops(
        torch.randn(2 * IMAGES, 3, 32, 32, generator=draws, dtype=torch.float64),
        torch.randn(LOCALS * IMAGES, 3, 16, 16, generator=draws, dtype=torch.float64),
        block_masks(2 * IMAGES, (4, 4), random.Random(0)),
        IMAGES,
    )


def micro_batches(crops):
    """Crops come view by view, so the images of a micro-batch lie apart."""
    for first in range(0, IMAGES, MICRO):
        here = torch.arange(first, first + MICRO)
        whole, local = (
            torch.cat([view * IMAGES + here for view in range(views)]) for views in (2, LOCALS)
        )
        yield Crops(crops.global_crops[whole], crops.local_crops[local], crops.masks[whole], MICRO)


class Collector(Balance):
    """Stands where targets are balanced, keeps the scores and leaves them as they are."""

    def __init__(self, objective):
        super().__init__(objective)
        self.scores = {"dino": [], "ibot": []}

    def __call__(self, term, logits, temperature):
        self.scores[term].append(logits)
        return logits


def accumulated(made, crops, *, balance_together):
    """Sum of the micro-batches' mean losses, each with its own backward pass."""
    parts, collector = list(micro_batches(crops)), Collector(made.objective)
    taught = [
        teach(made.teacher, part.global_crops, part.masks, MICRO, collector, TEMPERATURE)
        for part in parts
    ]
    targets = {}
    for term, scores in collector.scores.items():
        lengths = [len(rows) for rows in scores]
        if balance_together:
            rows = sinkhorn_knopp(torch.cat(scores), temperature=TEMPERATURE)
            targets[term] = rows.split(lengths)
        else:
            targets[term] = [sinkhorn_knopp(rows, temperature=TEMPERATURE) for rows in scores]
    total = 0.0
    for index, part in enumerate(parts):
        teaching = replace(
            taught[index],
            dino=targets["dino"][index].unflatten(0, (2, MICRO)),
            ibot=targets["ibot"][index],
        )
        losses = terms(made.objective, learn(made.student, part, hide=True), teaching, part, KNOBS)
        (losses.total / len(parts)).backward()
        total += losses.total.item() / len(parts)
    return total


def gradients(made):
    return {
        name: p.grad.clone() for name, p in made.student.named_parameters() if p.grad is not None
    }


def test_micro_batches_equal_the_large_batch_in_loss_and_gradients():
    made, crops = learner(), whole_batch()
    assert crops.masks is not None
    assert len({int(mask.sum()) for mask in crops.masks}) > 2  # micro-batches differ in masks
    whole = made.losses(crops, KNOBS)
    assert set(whole.terms) == {"dino_global", "dino_local", "ibot", "koleo"}
    whole.total.backward()
    expected = gradients(made)
    made.student.zero_grad()
    total = accumulated(made, crops, balance_together=True)
    assert total == pytest.approx(whole.total.item(), rel=1e-10)
    found = gradients(made)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


def test_targets_balanced_by_micro_batch_are_another_loss():
    made, crops = learner(), whole_batch()
    whole = made.losses(crops, KNOBS).total.item()
    assert abs(accumulated(made, crops, balance_together=False) - whole) > 1e-3 * whole

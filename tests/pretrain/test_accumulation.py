"""Micro-batches add up to the large batch, if what looks across images sees all of it.

Sinkhorn-Knopp has to balance the teacher's scores of all micro-batches at once, masks have to be
made for the whole batch, and regularizers have to see the class tokens of all.
"""

import random
from dataclasses import replace

import pytest
import torch

from dino_adapters.backbones import build_network
from dino_adapters.pretrain.accumulate import accumulate
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.masks import block_masks
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.recipes.continuing import AnchorRecipe
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.recipes.teachers import GramRecipe

SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 1, "rope_rescale": None, "layerscale": 1.0}
IMAGES, LOCALS, TEMPERATURE = 8, 3, 0.04
KNOBS = Knobs(0, 1e-3, 1e-3, 0.04, 0.9, TEMPERATURE, local_weight=0.7, regularizer_weight=0.3)


def objective(**told):
    small = {"prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8, "prototype_norm": 1.0}
    return ObjectiveRecipe.model_validate(small | told)


def learner(**told):
    network, _ = build_network("vitmicro8", architecture=SMALL, seed=1)
    made = SelfDistillation(
        network, objective(**told), seed=0, device=torch.device("cpu"), bf16=False
    )
    for networks in (made.student, made.teacher):
        networks.double()
    with torch.no_grad():  # a teacher of its own
        for parameter in made.teacher.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
    return made


def whole_batch(images=IMAGES, dtype=torch.float64):
    draws = torch.Generator().manual_seed(2)
    return Crops(
        torch.randn(2 * images, 3, 32, 32, generator=draws, dtype=dtype),
        torch.randn(LOCALS * images, 3, 16, 16, generator=draws, dtype=dtype),
        block_masks(2 * images, (4, 4), random.Random(0)),
        images,
    )


def gradients(made):
    return {
        name: p.grad.clone() for name, p in made.student.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "told",
    [
        {"koleo_group": 2},
        {},
        {"regularizer": "kde"},
        {"regularizer": "sigreg"},
        {"regularizer": "none"},
        {"centering": "softmax"},
    ],
    ids=str,
)
def test_micro_batches_equal_the_large_batch_in_loss_and_gradients(told, micro):
    made, crops = learner(**told), whole_batch()
    assert crops.masks is not None
    assert len({int(mask.sum()) for mask in crops.masks}) > 2  # micro-batches differ in masks
    whole = made.losses(crops, KNOBS)
    whole.total.backward()
    expected = gradients(made)
    made.forget()
    made.student.zero_grad()
    found = accumulate(made, crops, KNOBS, micro_batch=micro)
    assert set(found.terms) == set(whole.terms)
    for name, value in whole.terms.items():
        assert found.terms[name].item() == pytest.approx(value.item(), rel=1e-10), name
    assert found.total.item() == pytest.approx(whole.total.item(), rel=1e-10)
    found = gradients(made)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


def test_four_times_16_images_equal_64_in_single_precision():
    made, crops = learner(), whole_batch(64, torch.float32)
    for networks in (made.student, made.teacher):
        networks.float()
    whole = made.losses(crops, KNOBS)
    whole.total.backward()
    expected = gradients(made)
    made.forget()
    made.student.zero_grad()
    found = accumulate(made, crops, KNOBS, micro_batch=16)
    assert found.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    for name, gradient in gradients(made).items():
        apart = (gradient - expected[name]).norm() / expected[name].norm()
        assert apart < 1e-5, name


def test_centres_of_micro_batches_are_those_of_the_large_batch():
    centers = []
    for micro in (None, 2):
        made = learner(centering="softmax")
        accumulate(made, whole_batch(), KNOBS, micro_batch=micro)
        made.balance.move()
        centers.append(made.balance.centers)
    for term, center in centers[0].items():
        torch.testing.assert_close(centers[1][term], center)


def test_kin_counts_across_micro_batches():
    """KoLeo lets near-duplicates alone, also those that lie in different micro-batches."""
    crops = whole_batch()
    views = crops.global_crops.unflatten(0, (2, IMAGES))
    views[:, 4] = views[:, 0] + 1e-3 * views[:, 1]  # nearest neighbours, in two micro-batches
    crops = replace(crops, kin=torch.tensor([0, 1, 2, 3, 0, 5, 6, 7]))
    made = learner()
    whole = made.losses(crops, KNOBS)
    whole.total.backward()
    expected = gradients(made)
    made.student.zero_grad()
    found = accumulate(made, crops, KNOBS, micro_batch=2)
    assert found.terms["koleo"].item() == pytest.approx(whole.terms["koleo"].item(), rel=1e-10)
    without = made.losses(replace(crops, kin=None), KNOBS).terms["koleo"].item()
    assert without > whole.terms["koleo"].item() + 0.05
    for name, gradient in gradients(made).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11, msg=name)


def test_targets_balanced_by_micro_batch_are_another_loss():
    made, crops = learner(), whole_batch()
    whole = made.losses(crops, KNOBS).total.item()
    parts = [made.losses(part, KNOBS).total.item() for part in crops.parts(2)]
    assert abs(sum(parts) / len(parts) - whole) > 1e-3 * whole


def test_parts_hold_the_views_of_their_own_images():
    crops = whole_batch()
    first, second = crops.parts(4)
    views = crops.global_crops.unflatten(0, (2, IMAGES))
    torch.testing.assert_close(second.global_crops, views[:, 4:].flatten(0, 1))
    assert first.images == second.images == 4
    assert crops.parts(None) == [crops]
    assert [part.images for part in crops.parts(3)] == [3, 3, 2]


@pytest.mark.parametrize("micro", [2, 8])
def test_gram_and_anchor_add_up(micro):
    network, _ = build_network("vitmicro8", architecture=SMALL, seed=1)
    made = SelfDistillation(
        network,
        objective(),
        seed=0,
        device=torch.device("cpu"),
        bf16=False,
        gram=GramRecipe(teacher="start"),
        anchor=AnchorRecipe(cls_weight=0.7),
    )
    for networks in made.networks().values():
        networks.double()
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
    knobs = replace(KNOBS, gram_weight=2.0)
    crops = whole_batch()
    whole = made.losses(crops, knobs)
    whole.total.backward()
    expected = gradients(made)
    made.student.zero_grad()
    found = accumulate(made, crops, knobs, micro_batch=micro)
    for name in ("anchor", "gram"):
        assert found.terms[name].item() == pytest.approx(whole.terms[name].item(), rel=1e-10)
        assert whole.terms[name].item() > 1e-6
    for name, gradient in gradients(made).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10, msg=name)

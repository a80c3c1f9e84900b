"""One step of self-distillation against the same step written out term by term."""

import random

import pytest
import torch
import torch.nn.functional as F

from dino_adapters.backbones import build_network
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.masks import block_masks
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.recipes.sections import ObjectiveRecipe

IMAGES = 3


def knobs(temperature=0.05, **others):
    return Knobs(0, 1e-3, 1e-3, 0.04, 0.9, temperature, **others)


SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 2, "rope_rescale": None, "layerscale": 1.0}


def learner(**objective):
    network, _ = build_network("vitmicro8", architecture=SMALL, seed=1)
    told = {"prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8, "prototype_norm": 1.0}
    recipe = ObjectiveRecipe.model_validate({**told, **objective})
    made = SelfDistillation(network, recipe, seed=0, device=torch.device("cpu"), bf16=False)
    # A teacher that differs from the student, as after some steps.
    draws = torch.Generator().manual_seed(5)
    for parameter in made.teacher.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return made


def crops(local_count=2, views=2):
    draws = torch.Generator().manual_seed(2)
    local = torch.randn(local_count * IMAGES, 3, 16, 16, generator=draws) if local_count else None
    return Crops(
        torch.randn(views * IMAGES, 3, 32, 32, generator=draws),
        local,
        block_masks(views * IMAGES, (4, 4), random.Random(0)),
        IMAGES,
    )


def sinkhorn(logits, temperature):
    q = (logits / temperature).exp().T
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def written_out(made, given, temperature):
    """The objective of the paper, section 3, one pair and one patch at a time."""
    o, student, teacher = made.objective, made.student, made.teacher
    views = len(given.global_crops) // IMAGES
    with torch.no_grad():
        seen = teacher["backbone"](given.global_crops)
        target = sinkhorn(teacher["dino_head"](seen.cls), temperature)
        patch_target = sinkhorn(teacher["ibot_head"](seen.patches[given.masks]), temperature)
    (hidden,) = student["backbone"].forward_crops([given.global_crops], [given.masks])
    heads = [student["dino_head"](hidden.cls)]
    if given.local_crops is not None:
        heads.append(student["dino_head"](student["backbone"](given.local_crops).cls))
    logits = torch.cat(heads)
    pairs = []
    for s in range(len(logits) // IMAGES):
        for t in range(views):
            if s == t:
                continue
            z = logits[s * IMAGES : (s + 1) * IMAGES] / o.student_temperature
            p = target[t * IMAGES : (t + 1) * IMAGES]
            pairs.append(-(p * F.log_softmax(z, dim=-1)).sum(dim=-1).mean())
    total = o.dino_weight * torch.stack(pairs).mean()
    z = student["ibot_head"](hidden.patches[given.masks]) / o.student_temperature
    each = -(patch_target * F.log_softmax(z, dim=-1)).sum(dim=-1)
    crop_of = given.masks.nonzero()[:, 0]
    ibot = sum(each[crop_of == c].mean() for c in crop_of.unique()) / len(given.masks)
    total = total + o.ibot_weight * ibot
    for view in range(views):
        x = F.normalize(hidden.cls[view * IMAGES : (view + 1) * IMAGES], dim=-1)
        gap = torch.cdist(x, x) + torch.eye(IMAGES) * 9
        total = total - o.regularizer_weight * gap.min(dim=1).values.log().mean()
    return total


@pytest.mark.parametrize(("local_count", "views"), [(2, 2), (0, 2), (3, 3)])
def test_total_and_gradients_equal_the_written_out_step(local_count, views):
    made, given = learner(regularizer_weight=0.3, ibot_weight=0.7), crops(local_count, views)
    made.losses(given, knobs(0.07, regularizer_weight=0.3)).total.backward()
    ours = {n: p.grad.clone() for n, p in made.student.named_parameters() if p.grad is not None}
    made.student.zero_grad()
    expected = written_out(made, given, 0.07)
    expected.backward()
    total = made.losses(given, knobs(0.07, regularizer_weight=0.3)).total
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {n: p.grad for n, p in made.student.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_the_teacher_gets_no_gradient_and_moves_by_the_average():
    made = learner()
    before = [p.clone() for p in made.teacher.parameters()]
    made.losses(crops(), knobs()).total.backward()
    assert all(p.grad is None for p in made.teacher.parameters())
    made.after(knobs())
    student = made.student.parameters()
    for old, now, other in zip(before, made.teacher.parameters(), student, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * other)


def test_a_network_without_masks_trains_without_ibot():
    network, _ = build_network("resnet10t")
    made = SelfDistillation(
        network, ObjectiveRecipe(prototypes=8), seed=0, device=torch.device("cpu"), bf16=False
    )
    assert not made.with_ibot
    assert "ibot_head" not in made.student
    given = Crops(torch.randn(4, 3, 64, 64), torch.randn(4, 3, 32, 32), None, 2)
    losses = made.losses(given, knobs())
    assert "ibot" not in losses.terms
    assert "ibot" not in losses.numbers()
    losses.total.backward()


def test_bf16_stays_near_fp32():
    made, given = learner(), crops()
    exact = made.losses(given, knobs(0.07, regularizer_weight=0.3)).numbers()
    made.bf16 = True
    for name, value in made.losses(given, knobs(0.07, regularizer_weight=0.3)).numbers().items():
        assert value == pytest.approx(exact[name], rel=0.05, abs=0.05), name

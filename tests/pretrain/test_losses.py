"""Losses against triple loops over the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain.losses import (
    dino_loss,
    ibot_dense_loss,
    ibot_loss,
    koleo_loss,
)


def slow_dino(student, teacher, temperature, drop_diagonal):
    crops_s, images, _ = student.shape
    crops_t = teacher.shape[0]
    total, pairs = 0.0, 0
    for s in range(crops_s):
        for t in range(crops_t):
            if drop_diagonal and s == t:
                continue
            pairs += 1
            for b in range(images):
                log_p = torch.log_softmax(student[s, b] / temperature, dim=-1)
                total += float(-(teacher[t, b] * log_p).sum())
    return total / (images * max(pairs, 1))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    crops_s=st.integers(1, 5),
    crops_t=st.integers(1, 4),
    images=st.integers(1, 4),
    prototypes=st.integers(2, 9),
    drop=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dino_loss_is_the_mean_over_pairs(crops_s, crops_t, images, prototypes, drop, seed):
    draws = torch.Generator().manual_seed(seed)
    student = torch.randn(crops_s, images, prototypes, generator=draws, dtype=torch.float64)
    teacher = torch.randn(crops_t, images, prototypes, generator=draws, dtype=torch.float64)
    teacher = teacher.softmax(-1)
    ours = dino_loss(student, teacher, temperature=0.3, drop_diagonal=drop)
    if drop and crops_s == crops_t == 1:
        assert ours == 0
    else:
        assert float(ours) == pytest.approx(slow_dino(student, teacher, 0.3, drop), rel=1e-10)


def test_dino_loss_of_a_dead_head_is_log_k():
    teacher = torch.randn(2, 8, 1024).softmax(-1)
    assert float(dino_loss(torch.zeros(2, 8, 1024), teacher)) == pytest.approx(math.log(1024))


def test_dino_loss_sends_no_gradient_to_the_teacher():
    student = torch.randn(2, 3, 5, requires_grad=True)
    teacher = torch.randn(2, 3, 5, requires_grad=True)
    dino_loss(student, teacher.softmax(-1)).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_dino_loss_refuses_other_prototypes():
    with pytest.raises(ShapeError, match="prototypes must agree"):
        dino_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 6))


def test_ibot_loss_weighs_every_masked_crop_alike():
    draws = torch.Generator().manual_seed(3)
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    logits = torch.randn(3, 4, 6, generator=draws, dtype=torch.float64)
    targets = torch.randn(3, 4, 6, generator=draws, dtype=torch.float64).softmax(-1)
    expected = 0.0
    for crop in range(3):
        hidden = masks[crop].nonzero().flatten().tolist()
        for patch in hidden:
            log_p = torch.log_softmax(logits[crop, patch] / 0.1, dim=-1)
            expected -= float((targets[crop, patch] * log_p).sum()) / len(hidden)
    weights = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    ours = ibot_loss(logits[masks], targets[masks], weights, 3)
    assert float(ours) == pytest.approx(expected / 3, rel=1e-10)


def test_ibot_loss_of_no_masked_patch_is_zero_and_differentiable():
    logits = torch.zeros(0, 6, requires_grad=True)
    loss = ibot_loss(logits, torch.zeros(0, 6), torch.zeros(0), 4)
    loss.backward()
    assert loss == 0


def slow_koleo(tokens):
    x = [t / max(float(t.norm()), 1e-8) for t in tokens]
    total = 0.0
    for i, a in enumerate(x):
        others = [j for j in range(len(x)) if j != i]
        nearest = max(others, key=lambda j: float(a @ x[j]))
        total += math.log(float((a - x[nearest] + 1e-8).norm()) + 1e-8)
    return -total / len(x)


def test_koleo_is_minus_the_mean_log_distance():
    tokens = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(koleo_loss(tokens)) == pytest.approx(slow_koleo(tokens), rel=1e-9)


def test_koleo_reaches_the_neighbour_too():
    tokens = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2]], requires_grad=True)
    koleo_loss(tokens).backward()
    assert tokens.grad is not None
    # Token 1 is the neighbour of both others; with a one-sided gradient its own would be smaller.
    assert float(tokens.grad[1].norm()) > float(tokens.grad[2].norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_koleo_is_finite_on_duplicates(dtype, count):
    tokens = torch.ones(count, 16, dtype=dtype, requires_grad=True)
    loss = koleo_loss(tokens)
    loss.backward()
    assert torch.isfinite(loss)
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()
    if count > 1:
        assert 14 < loss.item() < 19


def test_koleo_never_pairs_a_token_with_itself():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(koleo_loss(opposite)) == pytest.approx(-math.log(2.0), abs=1e-5)


def test_dead_values_are_those_of_the_logs():
    """A head that says nothing: log K for the class token, half of it for half masked crops."""
    teacher = torch.randn(2, 3, 4096, generator=torch.Generator().manual_seed(0)).softmax(-1)
    student = torch.zeros(2, 3, 4096)
    for drop in (False, True):
        assert float(dino_loss(student, teacher, drop_diagonal=drop)) == pytest.approx(
            8.318, abs=1e-3
        )
    masks = torch.zeros(4, 3, dtype=torch.bool)
    masks[:2, :2] = True
    half = ibot_dense_loss(torch.zeros(4, 3, 4096), teacher.repeat(2, 1, 1), masks)
    assert float(half) == pytest.approx(0.5 * math.log(4096), abs=1e-3)


def test_dino_loss_stays_in_fp32_under_autocast():
    draws = torch.Generator().manual_seed(1)
    student = torch.randn(2, 3, 50, generator=draws)
    teacher = torch.randn(2, 3, 50, generator=draws).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = dino_loss(student, teacher)
    assert torch.equal(ours, dino_loss(student, teacher))


@settings(deadline=None, derandomize=True, max_examples=20)
@given(crops=st.integers(1, 5), patches=st.integers(1, 6), seed=st.integers(0, 99))
def test_dense_ibot_is_the_masked_one_and_its_loops(crops, patches, seed):
    draws = torch.Generator().manual_seed(seed)
    masks = torch.rand(crops, patches, generator=draws) < 0.4
    logits = torch.randn(crops, patches, 5, generator=draws, dtype=torch.float64)
    targets = torch.randn(crops, patches, 5, generator=draws, dtype=torch.float64).softmax(-1)
    expected = 0.0
    for crop in range(crops):
        hidden = masks[crop].nonzero().flatten().tolist()
        for patch in hidden:
            log_p = torch.log_softmax(logits[crop, patch] / 0.2, dim=-1)
            expected -= float((targets[crop, patch] * log_p).sum()) / len(hidden) / crops
    ours = ibot_dense_loss(logits, targets, masks, temperature=0.2)
    assert float(ours) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_dense_ibot_refuses_other_masks():
    with pytest.raises(ShapeError, match=r"\(B, N, K\) twice"):
        ibot_dense_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), torch.zeros(2, 4).bool())


def gradient_of(tokens, **settings):
    leaf = tokens.clone().requires_grad_()
    loss = koleo_loss(leaf, **settings)
    loss.backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    return float(loss.detach()), leaf.grad


def test_koleo_of_an_identical_pair_cancels_and_of_a_triple_does_not():
    token = torch.randn(1, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    value, pair = gradient_of(token.repeat(2, 1))
    assert 14 < value < 19
    assert float(pair.norm()) < 1e-3
    _, triple = gradient_of(token.repeat(3, 1))
    assert float(triple.norm()) > 1e4


def test_koleo_floor_bounds_the_gradient_and_leaves_far_tokens_alone():
    token = torch.randn(1, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    token /= token.norm()
    value, triple = gradient_of(token.repeat(3, 1), floor=1e-3)
    assert value == pytest.approx(-math.log(1e-3), abs=1e-3)
    assert float(triple.norm(dim=1).max()) < 1 / (2e-3)
    tokens = torch.randn(9, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with_floor, without = koleo_loss(tokens, floor=1e-3), koleo_loss(tokens)
    torch.testing.assert_close(with_floor, without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"group": 1}])
def test_koleo_of_a_group_of_one_is_zero(settings):
    value, gradient = gradient_of(torch.ones(1, 4), **settings)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_koleo_of_low_precision_is_computed_in_fp32(dtype):
    tokens = torch.randn(12, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = koleo_loss(tokens, neighbours=2)
    assert torch.equal(ours, koleo_loss(tokens.float(), neighbours=2))


def test_koleo_of_random_tokens_has_the_known_size():
    tokens = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    assert float(koleo_loss(tokens)) == pytest.approx(-0.31, abs=0.02)


def test_koleo_gradient_is_that_of_finite_differences():
    tokens = torch.randn(6, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def loss(x):
        return koleo_loss(x, neighbours=2, group=3, floor=0.1)

    assert torch.autograd.gradcheck(loss, (tokens.requires_grad_(),))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"neighbours": 6}, "6 neighbours in groups of 6"),
        ({"neighbours": 3, "group": 3}, "1 to 2 neighbours"),
        ({"neighbours": 0}, "0 neighbours"),
        ({"neighbours": 2, "group": 1}, "2 neighbours in groups of 1"),
        ({"group": 4}, "must divide the batch"),
        ({"group": 0}, "must divide the batch"),
    ],
)
def test_koleo_refuses_groups_that_do_not_fit(settings, says):
    with pytest.raises(ShapeError, match=says):
        koleo_loss(torch.ones(6, 4), **settings)

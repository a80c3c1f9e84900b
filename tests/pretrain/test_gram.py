"""The Gram loss against loops over pairs of patches, and the grid change against torch."""

import pytest
import torch
import torch.nn.functional as F

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain.gram import gram_loss, resize_tokens


def normal(*shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def slow_gram(student, teacher, normalize, negatives):
    """One matrix, entry by entry, from lists of tokens."""
    if normalize:
        student = [t / t.norm() for t in student]
        teacher = [t / t.norm() for t in teacher]
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            s, t = float(student[i] @ student[j]), float(teacher[i] @ teacher[j])
            if negatives == "clip":
                s, t = max(s, 0.0), max(t, 0.0)
            elif negatives == "clip_teacher":
                t = max(t, 0.0)
            elif negatives == "clip_shared":
                if s < 0 and t < 0:
                    s = 0.0
                t = max(t, 0.0)
            total += (s - t) ** 2
    return total / len(student) ** 2


@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher", "clip_shared"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("level", ["image", "batch"])
def test_equals_the_loops(level, normalize, negatives):
    student, teacher = normal(3, 7, 4), normal(3, 7, 4, seed=1)
    ours = gram_loss(student, teacher, level=level, normalize=normalize, negatives=negatives)
    if level == "image":
        images = zip(student, teacher, strict=True)
        expected = sum(slow_gram(s, t, normalize, negatives) for s, t in images) / 3
    else:
        flat = student.flatten(0, 1), teacher.flatten(0, 1)
        expected = slow_gram(*flat, normalize, negatives)
    assert float(ours) == pytest.approx(expected, rel=1e-10)


def test_the_four_ways_with_negatives_differ():
    student, teacher = normal(2, 9, 4), normal(2, 9, 4, seed=1)
    ways = ("keep", "clip", "clip_teacher", "clip_shared")
    found = {round(float(gram_loss(student, teacher, negatives=way)), 9) for way in ways}
    assert len(found) == 4


def test_picked_tokens_have_one_matrix():
    student, teacher = normal(6, 4), normal(6, 4, seed=1)
    image, batch = (gram_loss(student, teacher, level=level) for level in ("image", "batch"))
    assert image == batch
    assert float(image) == pytest.approx(slow_gram(student, teacher, True, "keep"), rel=1e-10)


def test_gradient_is_that_of_finite_differences():
    teacher = normal(2, 4, 3, seed=1)
    student = normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, teacher), (student,))


def test_the_teacher_gets_no_gradient_and_may_be_wider():
    student = normal(2, 4, 3).requires_grad_()
    teacher = normal(2, 4, 8, seed=1).requires_grad_()
    gram_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_turned_feature_space_costs_nothing():
    tokens = normal(2, 5, 6)
    turn, _ = torch.linalg.qr(normal(6, 6, seed=2))
    assert float(gram_loss(tokens @ turn, tokens)) < 1e-25


def test_a_collapsed_student_costs_what_the_teacher_tells_apart():
    teacher = F.normalize(normal(1, 6, 4), dim=-1)
    ours = gram_loss(torch.ones(1, 6, 4, dtype=torch.float64), teacher)
    torch.testing.assert_close(ours, (1 - teacher @ teacher.mT).square().mean())


def test_no_token_picked_is_zero_and_differentiable():
    student = torch.zeros(0, 4, requires_grad=True)
    loss = gram_loss(student, torch.zeros(0, 4))
    loss.backward()
    assert loss == 0


def test_low_precision_is_computed_in_fp32():
    student, teacher = normal(2, 9, 16).bfloat16(), normal(2, 9, 16, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gram_loss(student, teacher)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), gram_loss(student.double(), teacher.double()))


def test_refuses_other_places():
    with pytest.raises(ShapeError, match="resize_tokens"):
        gram_loss(torch.zeros(2, 4, 3), torch.zeros(2, 9, 3))


def slow_bilinear(grid, to):
    """Pixel areas aligned: the centre of a new pixel lies at (i + 0.5) * old / new - 0.5."""
    out = torch.zeros(*to, grid.shape[-1], dtype=grid.dtype)
    for i in range(to[0]):
        for j in range(to[1]):
            y = min(max((i + 0.5) * grid.shape[0] / to[0] - 0.5, 0.0), grid.shape[0] - 1.0)
            x = min(max((j + 0.5) * grid.shape[1] / to[1] - 0.5, 0.0), grid.shape[1] - 1.0)
            top, left = int(y), int(x)
            low, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
            a, b = y - top, x - left
            upper = (1 - b) * grid[top, left] + b * grid[top, right]
            lower = (1 - b) * grid[low, left] + b * grid[low, right]
            out[i, j] = (1 - a) * upper + a * lower
    return out


def test_resizing_keeps_rows_and_columns_apart():
    tokens = normal(2, 6 * 4, 3)
    ours = resize_tokens(tokens, (6, 4), (3, 5), mode="bilinear")
    for before, after in zip(tokens, ours, strict=True):
        expected = slow_bilinear(before.reshape(6, 4, 3), (3, 5)).reshape(15, 3)
        torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizing_keeps_a_constant(mode, antialias):
    tokens = normal(1, 1, 3).expand(2, 49, 3)
    ours = resize_tokens(tokens, (7, 7), (4, 3), mode=mode, antialias=antialias)
    torch.testing.assert_close(ours, tokens[:, :12])


def test_antialias_changes_a_shrunk_grid_only():
    tokens = normal(1, 64, 2)
    for to, same in (((4, 4), False), ((8, 8), True)):
        found = [resize_tokens(tokens, (8, 8), to, antialias=a) for a in (False, True)]
        assert torch.equal(found[0], found[1]) == same


def test_an_equal_grid_changes_nothing():
    tokens = normal(2, 12, 3).float()
    assert resize_tokens(tokens, (3, 4), (3, 4)) is tokens


def test_refuses_a_grid_that_is_not_filled():
    with pytest.raises(ShapeError, match=r"3x4\. Expected \(B, 12, D\)"):
        resize_tokens(torch.zeros(2, 13, 3), (3, 4), (2, 2))

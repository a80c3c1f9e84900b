"""The density estimate and SIGReg against loops, and what they push towards."""

import math

import pytest
import torch

from dino_adapters.pretrain.regularizers import kde_loss, sigreg_loss


def normal(*shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


@pytest.mark.parametrize("concentration", [1.0, 5.0, 50.0])
def test_kde_equals_the_loops(concentration):
    tokens = normal(9, 4)
    x = [t / t.norm() for t in tokens]
    total = 0.0
    for i, a in enumerate(x):
        kernels = [math.exp(concentration * float(a @ b)) for j, b in enumerate(x) if j != i]
        total += math.log(sum(kernels) / len(kernels))
    ours = kde_loss(tokens, concentration=concentration)
    assert float(ours) == pytest.approx(total / len(x), rel=1e-10)


def test_kde_of_equal_tokens_is_the_concentration_and_bounded():
    tokens = torch.ones(6, 8, requires_grad=True)
    loss = kde_loss(tokens)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(5.0)
    assert tokens.grad is not None
    assert float(tokens.grad.norm()) < 1e-5


def test_kde_of_even_tokens_is_as_documented():
    assert float(kde_loss(normal(2000, 64))) == pytest.approx(25 / 128, rel=0.1)


def test_kde_of_a_batch_of_one_is_zero():
    tokens = torch.ones(1, 8, requires_grad=True)
    loss = kde_loss(tokens)
    loss.backward()
    assert loss == 0
    assert tokens.grad is not None
    assert not tokens.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_fp32(dtype):
    tokens = normal(16, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kde_loss(tokens), sigreg_loss(tokens, step=0)
    expected = kde_loss(tokens.float()), sigreg_loss(tokens.float(), step=0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def slow_sigreg(shadows):
    """17 points from -5 to 5, complex numbers, torch's trapezoids."""
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    total = 0.0
    for shadow in shadows.T:
        wave = torch.exp(1j * t[:, None] * shadow[None]).mean(dim=1)
        gap = (wave - torch.exp(-(t**2) / 2)).abs() ** 2
        total += float(torch.trapezoid(gap * torch.exp(-(t**2) / 2), t))
    return total / shadows.shape[1]


def test_sigreg_equals_the_loops_where_the_direction_is_known():
    """In one dimension a unit direction is 1 or -1, which the statistic cannot tell apart."""
    vectors = normal(20, 1) * 1.7 + 0.3
    ours = sigreg_loss(vectors, step=5, directions=3)
    assert float(ours) == pytest.approx(slow_sigreg(vectors), rel=1e-10)


def test_sigreg_directions_are_of_unit_length_and_even():
    """On a basis vector scaled by c, the shadows are c times one coordinate of each direction."""
    vectors = torch.full((1, 3), 0.0, dtype=torch.float64)
    still = float(sigreg_loss(vectors, step=0))
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    normal_wave = torch.exp(-(t**2) / 2)
    expected = float(torch.trapezoid((1 - normal_wave) ** 2 * normal_wave, t))
    assert still == pytest.approx(expected, rel=1e-10)
    # Along any axis the mean over many directions is the same.
    along = [float(sigreg_loss(torch.eye(3).double()[i : i + 1] * 2, step=0)) for i in range(3)]
    assert max(along) - min(along) < 0.1 * max(along)


def test_sigreg_is_small_for_normal_vectors_and_large_for_others():
    batches = [sigreg_loss(normal(50, 8, seed=s), step=s, directions=64) for s in range(200)]
    assert float(torch.stack(batches).mean()) == pytest.approx(1.06 / 50, rel=0.1)
    good = float(sigreg_loss(normal(500, 8), step=1))
    assert float(sigreg_loss(normal(500, 8) * 3, step=1)) > 50 * good
    assert float(sigreg_loss(normal(500, 8) + 1, step=1)) > 20 * good
    assert float(sigreg_loss(torch.zeros(500, 8), step=1)) > 100 * good


def test_sigreg_depends_on_the_step_alone():
    vectors = normal(30, 6)
    first, again, other = (sigreg_loss(vectors, step=s, directions=16) for s in (4, 4, 5))
    assert first == again
    assert first != other


def test_sigreg_gradient_is_that_of_finite_differences():
    vectors = normal(5, 3).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: sigreg_loss(x, step=2, directions=4), (vectors,))

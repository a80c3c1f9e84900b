"""Sinkhorn-Knopp against the textbook form."""

import math

import pytest
import torch

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain.targets import sinkhorn_knopp, softmax_centering, update_center


def textbook(logits, temperature, rounds):
    q = (logits / temperature).exp().T
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(rounds):
        q = q / q.sum(dim=1, keepdim=True) / prototypes
        q = q / q.sum(dim=0, keepdim=True) / samples
    return (q * samples).T


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_equals_the_textbook_in_float64(rounds, temperature):
    logits = torch.randn(9, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = sinkhorn_knopp(logits, temperature=temperature, rounds=rounds)
    torch.testing.assert_close(ours, textbook(logits, temperature, rounds), rtol=1e-10, atol=1e-14)


def test_rows_sum_to_one_and_columns_come_near_balance():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    p = sinkhorn_knopp(logits, temperature=0.5, rounds=10)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(p.sum(dim=0), torch.full((16,), 4.0), rtol=1e-2, atol=1e-2)


def test_survives_logits_that_overflow_the_textbook():
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)) * 1e4
    assert not torch.isfinite(textbook(logits, 0.04, 3)).all()
    p = sinkhorn_knopp(logits, temperature=0.04)
    assert torch.isfinite(p).all()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(8))


def test_ignores_a_constant_per_prototype_but_not_per_sample():
    draws = torch.Generator().manual_seed(4)
    logits = torch.randn(8, 6, generator=draws, dtype=torch.float64)
    base = sinkhorn_knopp(logits, temperature=0.1)
    per_prototype = logits + torch.randn(1, 6, generator=draws, dtype=torch.float64)
    per_sample = logits + torch.randn(8, 1, generator=draws, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_knopp(per_prototype, temperature=0.1), base)
    assert (sinkhorn_knopp(per_sample, temperature=0.1) - base).abs().max() > 1e-3


def test_target_entropy_keeps_its_floor():
    """A balanced marginal of K prototypes over B rows leaves at least log(K / B) per row."""
    logits = torch.randn(32, 1024, generator=torch.Generator().manual_seed(5)) * 3
    p = sinkhorn_knopp(logits, temperature=0.04, rounds=20)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(dim=1).mean()
    assert float(entropy) >= math.log(1024 / 32) - 1e-2


def test_no_rows_in_no_rows_out():
    assert sinkhorn_knopp(torch.zeros(0, 7), temperature=0.04).shape == (0, 7)


def test_ignores_a_constant_for_all_logits():
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    base = sinkhorn_knopp(logits, temperature=0.1)
    torch.testing.assert_close(sinkhorn_knopp(logits + 3.7, temperature=0.1), base)


@pytest.mark.parametrize("shape", [(6, 2), (128, 4096)])
def test_entropy_floor_at_three_rounds(shape):
    rows, prototypes = shape
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    p = sinkhorn_knopp(logits, temperature=0.07)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(dim=1).mean()
    assert math.log(prototypes / rows) - 1e-2 <= float(entropy) <= math.log(prototypes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_balanced_in_fp32(dtype):
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(8)).to(dtype)
    p = sinkhorn_knopp(logits, temperature=0.04)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, sinkhorn_knopp(logits.float(), temperature=0.04))


def test_centering_by_loops():
    draws = torch.Generator().manual_seed(9)
    logits = torch.randn(5, 4, generator=draws, dtype=torch.float64)
    center = torch.randn(1, 4, generator=draws, dtype=torch.float64)
    p = softmax_centering(logits, center, temperature=0.3)
    for b in range(5):
        weights = [math.exp((float(logits[b, k]) - float(center[0, k])) / 0.3) for k in range(4)]
        assert p[b].tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_center_moves_towards_the_mean_and_stays_without_rows():
    center, logits = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0], [5.0, 2.0]])
    moved = update_center(center, logits, momentum=0.75)
    torch.testing.assert_close(moved, torch.tensor([[1.75, -1.25]]))
    assert torch.equal(update_center(center, torch.zeros(0, 2)), center)
    assert torch.equal(center, torch.tensor([[1.0, -2.0]]))


def test_center_of_low_precision_logits_stays_in_its_own():
    moved = update_center(torch.zeros(1, 3), torch.full((1000, 3), 0.1, dtype=torch.bfloat16))
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full((1, 3), float(torch.tensor(0.1).bfloat16()) / 10))


def test_center_refuses_other_prototypes():
    with pytest.raises(ShapeError, match="same K"):
        update_center(torch.zeros(1, 3), torch.zeros(5, 4))

"""Block masks: exact counts, and which crops they fall on."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.pretrain.masks import block_masks, mask_weights, reference_block_limit

ANY = settings(deadline=None, derandomize=True, max_examples=40)
STEPS = {
    "crops": st.integers(1, 12),
    "height": st.integers(1, 15),
    "width": st.integers(1, 15),
    "probability": st.floats(0, 1),
    "seed": st.integers(0, 9),
    "shift": st.booleans(),
    "most": st.none() | st.integers(1, 40),
}


class Logged(random.Random):
    """Remembers which draws were made, with what limits."""

    def __init__(self, seed):
        super().__init__(seed)
        self.log = []

    def uniform(self, a, b):
        self.log.append(("uniform", a, b))
        return super().uniform(a, b)

    def randint(self, a, b):
        self.log.append(("randint", a, b))
        return super().randint(a, b)

    def sample(self, population, k, *, counts=None):
        self.log.append(("sample", len(population), k))
        return super().sample(population, k, counts=counts)


@ANY
@given(**STEPS)
def test_counts_are_the_upper_edges_of_the_bins(
    crops, height, width, probability, seed, shift, most
):
    draws = random.Random(seed)
    masks = block_masks(
        crops, (height, width), draws, probability=probability, shift=shift, most=most
    )
    masked = int(crops * probability)
    edges = torch.linspace(0.1, 0.5, masked + 1)
    expected = [int(height * width * edges[j + 1].item()) for j in range(masked)]
    assert masks.shape == (crops, height * width)
    assert sorted(masks.sum(dim=1).tolist()) == sorted(expected + [0] * (crops - masked))


def test_the_published_example():
    counts = block_masks(16, (14, 14), random.Random(0)).sum(dim=1)
    assert sorted(counts[counts > 0].tolist()) == [29, 39, 49, 58, 68, 78, 88, 98]


def test_every_place_in_the_batch_is_masked_alike():
    draws = random.Random(0)
    hits = torch.zeros(8)
    for _ in range(400):
        hits += block_masks(8, (6, 6), draws).any(dim=1)
    # 400 draws of probability 1/2: the deviation is 10, so 60 either side is six of them.
    assert ((hits - 200).abs() < 60).all()


def test_blocks_hang_together_more_than_single_patches():
    def neighbours(mask):
        grid = mask.view(14, 14)
        return float((grid[:, 1:] & grid[:, :-1]).sum())

    draws = random.Random(1)
    blocks = scattered = 0.0
    for mask in block_masks(40, (14, 14), draws, probability=1.0):
        blocks += neighbours(mask)
        shuffled = mask[torch.randperm(196, generator=torch.Generator().manual_seed(0))]
        scattered += neighbours(shuffled)
    assert blocks > 1.5 * scattered


def test_weights_give_every_masked_crop_a_sum_of_one():
    masks = block_masks(6, (7, 7), random.Random(2))
    weights = torch.zeros(masks.shape).masked_scatter(masks, mask_weights(masks))
    torch.testing.assert_close(weights.sum(dim=1), masks.any(dim=1).float())


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_few_crops_may_have_no_mask(probability):
    assert not block_masks(4, (7, 7), random.Random(0), probability=probability).any()


@ANY
@given(**STEPS)
def test_uniform_counts_lie_in_their_bins(crops, height, width, probability, seed, shift, most):
    masks = block_masks(
        crops,
        (height, width),
        random.Random(seed),
        probability=probability,
        shift=shift,
        most=most,
        bins="uniform",
    )
    masked = int(crops * probability)
    edges = torch.linspace(0.1, 0.5, masked + 1).tolist()
    counts = sorted(masks.sum(dim=1).tolist())
    assert counts[: crops - masked] == [0] * (crops - masked)
    for index, count in enumerate(counts[crops - masked :]):
        low, high = (int(height * width * edge) for edge in edges[index : index + 2])
        assert low <= count <= high


def test_uniform_ratios_have_the_mean_of_the_range():
    draws = random.Random(0)
    counts = [
        int(block_masks(1, (10, 10), draws, probability=1.0, bins="uniform").sum())
        for _ in range(400)
    ]
    # Uniform over 10..49 of 100: mean 29.5, deviation 11.5, of the mean 0.58; six of them.
    assert abs(sum(counts) / 400 - 29.5) < 6 * 0.58
    assert min(counts) < 14
    assert max(counts) > 45


@pytest.mark.parametrize(
    ("size", "patch", "limit"),
    [(112, 16, 21), (240, 16, 105), (224, 16, 98), (256, 16, 128), (224, 14, 128), (56, 8, 21)],
)
def test_the_reference_rounds_its_largest_block_twice(size, patch, limit):
    assert reference_block_limit(size, patch) == limit


@pytest.mark.parametrize("bins", ["edges", "uniform"])
@pytest.mark.parametrize("shift", [False, True])
def test_draws_come_in_the_order_that_is_told(bins, shift):
    draws = Logged(3)
    masks = block_masks(6, (7, 5), draws, bins=bins, shift=shift)
    edges = torch.linspace(0.1, 0.5, 4).tolist()
    log = iter(draws.log)
    counts = sorted(masks.sum(dim=1).tolist())[3:]
    for index, count in enumerate(counts):
        if bins == "uniform":
            assert next(log) == ("uniform", *edges[index : index + 2])
        completed = next(entry for entry in log if entry[0] == "sample")
        # Cells that were free, less those that were added, are all but the masked ones.
        assert completed[1] - completed[2] == 35 - count
        if shift:
            assert [next(log), next(log)] == [("randint", 0, 6), ("randint", 0, 4)]
    assert list(log) == [("sample", 35, 0)] * 3


def test_a_shift_rolls_rows_and_columns():
    class Remembering(random.Random):
        drawn: list[int]

        def randint(self, a, b):
            self.drawn.append(super().randint(a, b))
            return self.drawn[-1]

    for seed in range(5):
        draws = Remembering(seed)
        draws.drawn = []
        (rolled,) = block_masks(1, (7, 5), draws, probability=1.0, shift=True).view(1, 7, 5)
        (plain,) = block_masks(1, (7, 5), random.Random(seed), probability=1.0).view(1, 7, 5)
        down, right = draws.drawn[-2:]
        for row in range(7):
            for column in range(5):
                assert rolled[(row + down) % 7, (column + right) % 5] == plain[row, column]


def test_a_shift_hides_the_border_as_often_as_the_centre():
    def hits(shift):
        draws, total = random.Random(0), torch.zeros(36)
        for _ in range(150):
            total += block_masks(4, (6, 6), draws, probability=1.0, shift=shift).sum(dim=0)
        grid = total.view(6, 6)
        return float(grid[[0, 0, 5, 5], [0, 5, 0, 5]].mean() / grid[2:4, 2:4].mean())

    assert hits(False) < 0.75
    assert abs(hits(True) - 1) < 0.15


@pytest.mark.parametrize("bins", ["edges", "uniform"])
def test_crops_share_all_sizes_alike(bins):
    """Place in the batch says nothing about how much is hidden, nor about the neighbour."""
    draws, runs = random.Random(0), 300
    counts = torch.stack(
        [block_masks(6, (6, 6), draws, bins=bins).sum(dim=1) for _ in range(runs)]
    ).double()
    # Deviation of one count over the mean of all runs; six of them either side.
    margin = 6 * float(counts.std()) / runs**0.5
    assert ((counts.mean(dim=0) - counts.mean()).abs() < margin).all()
    both = torch.stack(
        [(counts[:, i] > 0) & (counts[:, j] > 0) for i in range(6) for j in range(i)]
    )
    # Three of six are masked: a pair is with probability 3/6 * 2/5 = 0.2, deviation 6.9 in 300.
    assert ((both.sum(dim=1) - 60).abs() < 6 * 6.9).all()

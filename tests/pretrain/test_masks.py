"""Block masks: exact counts, and which crops they fall on."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.pretrain.masks import block_masks, mask_weights


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    crops=st.integers(1, 12),
    height=st.integers(1, 15),
    width=st.integers(1, 15),
    probability=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_counts_are_the_upper_edges_of_the_bins(crops, height, width, probability, seed):
    masks = block_masks(crops, (height, width), random.Random(seed), probability=probability)
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

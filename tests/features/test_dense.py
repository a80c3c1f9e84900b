"""Dense features: each function against a slow, obvious one, and its edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, RecipeError, ShapeError
from dino_adapters.features.dense import (
    local_share,
    patch_consistency,
    patch_labels,
    segment_by_neighbours,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / length) if length else 0.0


# patch_labels


def slow_labels(mask, grid):
    found = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            votes = {}
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    here = (y * grid[0] // mask.shape[0], x * grid[1] // mask.shape[1])
                    label = int(mask[y, x])
                    if here == (row, column) and label >= 0:
                        votes[label] = votes.get(label, 0) + 1
            found.append(min(votes, key=lambda i: (-votes[i], i)) if votes else -1)
    return found


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.data())
def test_labels_equal_the_slow_count(seed, high, wide, data):
    rows, columns = data.draw(st.integers(high, 11)), data.draw(st.integers(wide, 11))
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.integers(-1, 3, (rows, columns)))
    assert patch_labels(mask, (high, wide)).tolist() == slow_labels(mask, (high, wide))


def test_labels_of_whole_patches_unlabelled_patches_and_ties():
    mask = torch.tensor([[2, 2, -1, -1], [2, 0, -1, -1], [1, 0, 5, -1], [0, 1, -1, -1]])
    assert patch_labels(mask, (2, 2)).tolist() == [2, -1, 0, 5]
    assert patch_labels(torch.full((4, 4), -1), (2, 2)).tolist() == [-1] * 4
    assert patch_labels(mask.to(torch.uint8).clamp(max=3), (1, 1)).dtype == torch.int64


@pytest.mark.parametrize(
    ("mask", "grid", "match"),
    [
        (torch.zeros(4, 4), (2, 2), "whole number a pixel"),
        (torch.zeros(1, 4, 4, dtype=torch.long), (2, 2), "whole number a pixel"),
        (torch.zeros(4, 4, dtype=torch.long), (5, 2), "coarser grid"),
        (torch.zeros(4, 4, dtype=torch.long), (0, 2), "coarser grid"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, grid, match):
    with pytest.raises(ShapeError, match=match):
        patch_labels(mask, grid)


# segment_by_neighbours


def slow_votes(train, labels, test, k, classes, temperature):
    found = []
    for query in test:
        scores = [
            (cosine(query, row), index) for index, row in enumerate(train) if labels[index] >= 0
        ]
        best = sorted(scores, key=lambda pair: (-pair[0], pair[1]))[:k]
        votes = [0.0] * classes
        for score, index in best:
            votes[int(labels[index])] += math.exp(score / temperature)
        found.append(votes.index(max(votes)))
    return found


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_equal_the_slow_count(k, temperature):
    train, test = noise(40, 6), noise(30, 6, seed=1)
    labels = torch.randint(-1, 4, (40,), generator=torch.Generator().manual_seed(2))
    found = segment_by_neighbours(train, labels, test, k=k, classes=5, temperature=temperature)
    assert found.tolist() == slow_votes(train, labels, test, k, 5, temperature)


def test_separate_classes_are_found_whatever_the_scale_of_the_vectors():
    centres = torch.eye(3, 8)
    labels = torch.arange(60) % 3
    train = (centres[labels] + 0.05 * noise(60, 8)) * (1 + torch.arange(60))[:, None]
    truth = torch.arange(30) % 3
    test = (centres[truth] + 0.05 * noise(30, 8, seed=1)).half()
    assert torch.equal(segment_by_neighbours(train, labels, test, classes=3), truth)


def test_a_tiny_temperature_leaves_the_nearest_one_alone():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1]])
    found = segment_by_neighbours(
        train, torch.tensor([1, 0, 0]), train[:1], k=3, classes=2, temperature=1e-5
    )
    assert found.tolist() == [1]


def test_equal_votes_go_to_the_lower_class():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = segment_by_neighbours(train, torch.tensor([2, 1]), train[:1], k=2, classes=3)
    assert found.tolist() == [1]


def test_unfit_labels_and_settings_are_refused():
    train, labels = noise(4, 3), torch.tensor([0, 1, -1, 1])
    with pytest.raises(ShapeError, match="labels and"):
        segment_by_neighbours(train, labels[:3], train, classes=2, k=1)
    with pytest.raises(DataError, match="label 1 and there are 1 classes"):
        segment_by_neighbours(train, labels, train, classes=1, k=1)
    with pytest.raises(RecipeError, match="temperature is 0"):
        segment_by_neighbours(train, labels, train, classes=2, k=1, temperature=0.0)
    with pytest.raises(ShapeError, match="k is 4 and the bank has 3"):
        segment_by_neighbours(train, labels, train, classes=2, k=4)


# patch_consistency


def slow_consistency(a, b):
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
    first = [cosine(a[i], a[j]) for i, j in pairs]
    second = [cosine(b[i], b[j]) for i, j in pairs]
    return float(np.corrcoef(first, second)[0, 1])


@pytest.mark.parametrize(("count", "width"), [(3, 2), (9, 4), (16, 32)])
def test_consistency_equals_the_slow_correlation(count, width):
    a = noise(count, width)
    b = a + noise(count, width, seed=1)
    a[1] = 0.0  # a zero vector is like nothing
    assert patch_consistency(a, b) == pytest.approx(slow_consistency(a, b), abs=1e-9)


def test_turning_and_scaling_the_features_changes_nothing():
    a = noise(20, 6)
    turn = torch.linalg.qr(noise(6, 6, seed=1)).Q
    scales = torch.rand(20, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    assert patch_consistency(a, (a @ turn) * scales) == pytest.approx(1.0, abs=1e-6)
    assert patch_consistency(a, torch.cat([a, a], dim=1)) == pytest.approx(1.0, abs=1e-6)


def test_noise_lowers_consistency():
    a = noise(50, 16)
    values = [patch_consistency(a, a + level * noise(50, 16, seed=1)) for level in (0.1, 0.5, 2, 9)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.97
    assert abs(patch_consistency(a, noise(50, 16, seed=2))) < 0.1


def test_mirrored_back_or_not():
    places = noise(4, 6, 8)
    mirrored = places.flip(1)
    back = mirrored.flip(1).flatten(0, 1)
    assert patch_consistency(places.flatten(0, 1), back) == pytest.approx(1.0)
    assert patch_consistency(places.flatten(0, 1), mirrored.flatten(0, 1)) < 0.9


def test_a_collapsed_view_has_no_pattern():
    same = noise(1, 7).expand(10, 7)
    assert math.isnan(patch_consistency(same, noise(10, 7, seed=1)))
    assert math.isnan(patch_consistency(noise(10, 7, seed=1), same * torch.arange(1, 11)[:, None]))


def test_views_that_do_not_match_are_refused():
    with pytest.raises(ShapeError, match="same N places"):
        patch_consistency(noise(4, 3), noise(5, 3))
    with pytest.raises(ShapeError, match="needs 3 or more"):
        patch_consistency(noise(2, 3), noise(2, 3))
    with pytest.raises(DataError, match="not finite"):
        patch_consistency(noise(4, 3), noise(4, 3) / 0.0)


# local_share


def slow_share(patches, grid):
    near, pairs = [], []
    for i in range(len(patches)):
        for j in range(len(patches)):
            if i == j:
                continue
            pairs.append(cosine(patches[i], patches[j]))
            (y, x), (v, u) = divmod(i, grid[1]), divmod(j, grid[1])
            if abs(y - v) + abs(x - u) == 1:
                near.append(pairs[-1])
    return float(np.mean(near) - np.mean(pairs))


@pytest.mark.parametrize("grid", [(1, 2), (4, 1), (3, 3), (2, 5)])
def test_share_equals_the_slow_mean(grid):
    patches = noise(grid[0] * grid[1], 5)
    patches[0] = 0.0
    assert local_share(patches, grid) == pytest.approx(slow_share(patches, grid), abs=1e-12)


def test_smooth_maps_score_above_noise_and_collapse():
    y, x = torch.meshgrid(torch.linspace(0, 3, 8), torch.linspace(0, 3, 8), indexing="ij")
    smooth = torch.stack([y.cos(), y.sin(), x.cos(), x.sin()], dim=-1).flatten(0, 1)
    assert local_share(smooth, (8, 8)) > 0.4
    assert abs(local_share(noise(64, 64), (8, 8))) < 0.05
    assert local_share(noise(1, 5).expand(64, 5), (8, 8)) == pytest.approx(0.0, abs=1e-12)


def test_patches_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ShapeError, match="two patches or more"):
        local_share(noise(5, 3), (2, 3))
    with pytest.raises(ShapeError, match="two patches or more"):
        local_share(noise(1, 3), (1, 1))

"""Which sizes the crops of a step have: drawn by seed and step, as often as the recipe says."""

from collections import Counter

import pytest

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain import pretrain
from dino_adapters.pretrain.assemble import assemble
from dino_adapters.pretrain.augment import Sizes
from dino_adapters.pretrain.sizes import all_sizes, largest_side, sizes_at, snapshot_steps
from dino_adapters.runtime.runfolder import RunFolder

MIXTURE = [
    {"global_size": 24, "local_size": 16, "gram_size": 40, "probability": 3.0},
    {"global_size": 32, "local_size": 16, "gram_size": 48, "probability": 1.0},
    {"global_size": 48, "local_size": 24, "probability": 2.0},
]


@pytest.fixture
def mixed(tiny):
    return lambda **changes: tiny(crops={"mixture": MIXTURE}, **changes)


def test_without_a_mixture_all_steps_have_the_recipes_sizes(tiny):
    assert {sizes_at(step, tiny()) for step in range(20)} == {Sizes(24, 16, None)}
    assert sizes_at(3, tiny(gram={"size": 48})) == Sizes(24, 16, 48)


def test_sizes_come_as_often_as_their_probability_says(mixed):
    recipe = mixed()
    count = 3000
    found = Counter(sizes_at(step, recipe).global_size for step in range(count))
    # Five standard deviations of a binomial at p = 1/2 are 0.046.
    for size, share in ((24, 3 / 6), (32, 1 / 6), (48, 2 / 6)):
        assert found[size] / count == pytest.approx(share, abs=0.046)


def test_sizes_are_a_function_of_seed_and_step(mixed):
    def drawn(seed, steps):
        return [sizes_at(step, mixed(seed=seed)) for step in steps]

    forward = drawn(4, range(40))
    assert drawn(4, range(39, -1, -1))[::-1] == forward
    assert drawn(5, range(40)) != forward


def test_crops_of_the_gram_teacher_are_made_only_with_gram(tiny, mixed):
    assert {sizes.gram_size for sizes in all_sizes(mixed())} == {None}
    # Where no size is told, an undistorted crop of the global size.
    assert [sizes.gram_size for sizes in all_sizes(mixed(gram={}))] == [40, 48, 48]
    assert [sizes.gram_size for sizes in all_sizes(mixed(gram={"distort": True}))] == [40, 48, None]
    assert [sizes.gram_size for sizes in all_sizes(tiny(gram={"teacher": "live"}))] == [None]


def test_the_largest_side_counts_the_gram_teachers_crops(tiny, mixed):
    assert largest_side(mixed()) == 48
    assert largest_side(tiny(gram={"size": 64})) == 64


def test_snapshots_are_spread_evenly_and_spare_the_last_step(tiny):
    assert snapshot_steps(tiny(steps=8, checkpoint={"snapshots": 3})) == {2, 4, 6}
    assert snapshot_steps(tiny(steps=8)) == frozenset()


def test_crops_and_masks_have_the_sizes_of_their_step(mixed, tmp_path):
    run = assemble(mixed(gram={}, steps=12), RunFolder(tmp_path / "run"), resume=False)
    seen = set()
    for step, images in run.batches():
        sizes = sizes_at(step, run.recipe)
        crops = run.crops(step, images)
        assert crops.global_crops.shape == (8, 3, sizes.global_size, sizes.global_size)
        assert crops.local_crops is not None
        assert crops.local_crops.shape[-1] == sizes.local_size
        assert crops.masks is not None
        assert crops.masks.shape == (8, (sizes.global_size // 8) ** 2)
        gram = None if crops.gram_crops is None else crops.gram_crops.shape[-1]
        assert gram == sizes.gram_size
        seen.add(sizes)
    assert len(seen) > 1


def test_a_mixture_that_no_patch_divides_is_refused_before_the_first_step(tiny, tmp_path):
    mixture = [MIXTURE[0], {"global_size": 28, "local_size": 16}]
    with pytest.raises(ShapeError, match=r"size of the recipe is 28 px, .* Take multiples of 8 px"):
        pretrain(tiny(crops={"mixture": mixture}), RunFolder(tmp_path / "run"), quiet=True)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))

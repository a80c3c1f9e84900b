from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError
from dino_adapters.data.shots import FEWER, draw_shots, read_shots, write_shots
from dino_adapters.runtime.console import Notices

images = st.lists(
    st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.integers(0, 4))),
    min_size=1,
    max_size=60,
)


def data_of(drawn: list[tuple[str, int | None]]):
    keys = [f"{at:03d}" for at in range(len(drawn))]
    labels = {key: label for key, (label, _) in zip(keys, drawn, strict=True)}
    groups = {
        key: f"g{group}" for key, (_, group) in zip(keys, drawn, strict=True) if group is not None
    }
    return keys, labels, groups


class TestDrawShots:
    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(images, st.integers(0, 5))
    def test_balanced_and_nested(self, drawn, seed: int):
        keys, labels, groups = data_of(drawn)
        sizes = Counter(labels.values())
        draws = draw_shots(keys, labels, groups, shots=(5, 1, 3), seed=seed)
        assert list(draws) == [1, 3, 5]
        assert set(draws[1]) <= set(draws[3]) <= set(draws[5])
        for count, chosen in draws.items():
            assert len(set(chosen)) == len(chosen)
            assert Counter(labels[key] for key in chosen) == {
                label: min(count, size) for label, size in sizes.items()
            }

    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(images, st.integers(0, 5))
    def test_no_group_comes_again_while_another_has_not_come(self, drawn, seed: int):
        keys, labels, groups = data_of(drawn)
        for count, chosen in draw_shots(keys, labels, groups, shots=range(1, 8), seed=seed).items():
            for label in set(labels.values()):
                there = Counter(groups.get(key, key) for key in keys if labels[key] == label)
                taken = Counter(groups.get(key, key) for key in chosen if labels[key] == label)
                most = max(taken.values())
                # A group given less often than the most used one has nothing more to give.
                assert all(
                    taken[group] >= most - 1 or taken[group] == size
                    for group, size in there.items()
                )
                assert sum(taken.values()) <= count

    @settings(deadline=None, derandomize=True, max_examples=50)
    @given(images, st.randoms(use_true_random=False))
    def test_the_order_of_input_does_not_matter(self, drawn, shuffler: random.Random):
        keys, labels, groups = data_of(drawn)
        first = draw_shots(keys, labels, groups, seed=1)
        shuffler.shuffle(keys)
        assert draw_shots(keys, labels, groups, seed=1) == first

    def test_another_class_leaves_the_draw_of_a_class_alone(self):
        keys = [f"a{at}" for at in range(20)] + [f"b{at}" for at in range(20)]
        labels = {key: key[0] for key in keys}
        both = draw_shots(keys, labels, {}, seed=4)[5]
        alone = draw_shots(keys[:20], labels, {}, seed=4)[5]
        assert both[:5] == alone

    def test_draws_and_seeds_differ(self):
        keys = [f"{at:02d}" for at in range(60)]
        labels = dict.fromkeys(keys, "x")
        drawn = {
            draw_shots(keys, labels, {}, seed=seed, draw=draw)[5]
            for seed in range(4)
            for draw in range(4)
        }
        assert len(drawn) == 16

    def test_every_image_can_be_drawn(self):
        keys = [f"{at}" for at in range(6)]
        labels, groups = dict.fromkeys(keys, "x"), dict.fromkeys(keys[:3], "g")
        firsts = Counter(
            draw_shots(keys, labels, groups, shots=(1,), seed=0, draw=draw)[1][0]
            for draw in range(400)
        )
        # Groups are equal: g (three images) and three images of their own, a quarter each.
        assert set(firsts) == set(keys)
        assert 60 < firsts["5"] < 140
        assert 10 < firsts["0"] < 60

    def test_small_classes_give_all_and_are_named(self):
        notices = Notices()
        drawn = draw_shots(["a", "b"], {"a": "x", "b": "x"}, {}, seed=0, notices=notices)
        assert sorted(drawn[5]) == ["a", "b"]
        assert notices.counts[FEWER] == 2
        assert notices.examples[FEWER] == ["x has 2 of 3", "x has 2 of 5"]

    def test_refusals(self):
        with pytest.raises(DataError, match="None of the images"):
            draw_shots(["a"], {}, {}, seed=0)
        with pytest.raises(DataError, match=r"shots is \[0, 1\]"):
            draw_shots(["a"], {"a": "x"}, {}, shots=(0, 1), seed=0)


class TestFiles:
    def test_round_trip(self, tmp_path: Path):
        keys = [f"{at:02d}" for at in range(20)]
        labels = {key: key[0] for key in keys}
        draws = [draw_shots(keys, labels, {}, seed=7, draw=draw) for draw in range(3)]
        write_shots(tmp_path / "shots.json", draws, seed=7)
        assert read_shots(tmp_path / "shots.json") == draws
        assert json.loads((tmp_path / "shots.json").read_text())["seed"] == 7

    def test_refusals(self, tmp_path: Path):
        for text in ("{", '{"draws": 3}', "[]", '{"draws": [{"x": []}]}'):
            (tmp_path / "shots.json").write_text(text)
            with pytest.raises(DataError, match="holds no few-shot draws"):
                read_shots(tmp_path / "shots.json")

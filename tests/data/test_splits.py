from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, SplitLeakError
from dino_adapters.data.source import open_source
from dino_adapters.data.splits import (
    PARTS,
    Split,
    check_leaks,
    make_split,
    read_split,
    read_splits_json,
    write_split,
)
from dino_adapters.runtime.console import Notices

# A random data set: for each image its class and its group (None: a group of its own).
images = st.lists(
    st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 12))),
    min_size=5,
    max_size=80,
)


def data_of(drawn: list[tuple[str, int | None]]):
    keys = [f"{at:03d}.png" for at in range(len(drawn))]
    labels = {key: label for key, (label, _) in zip(keys, drawn, strict=True)}
    groups = {
        key: f"g{group}" for key, (_, group) in zip(keys, drawn, strict=True) if group is not None
    }
    return keys, labels, groups


def enough(keys: list[str], groups: dict[str, str]) -> bool:
    return len({groups.get(key, key) for key in keys}) >= 3


class TestMakeSplit:
    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(images, st.integers(0, 5))
    def test_every_image_once_and_no_group_twice(self, drawn, seed: int):
        keys, labels, groups = data_of(drawn)
        if not enough(keys, groups):
            with pytest.raises(DataError, match="groups cannot be split"):
                make_split(keys, labels, groups, seed=seed)
            return
        split = make_split(keys, labels, groups, seed=seed)
        assert sorted([*split.train, *split.val, *split.test]) == keys
        homes = [{groups.get(key, key) for key in getattr(split, part)} for part in PARTS]
        assert not homes[0] & homes[1]
        assert not homes[0] & homes[2]
        assert not homes[1] & homes[2]
        assert all(homes)

    @settings(deadline=None, derandomize=True, max_examples=50)
    @given(images, st.integers(0, 5), st.randoms(use_true_random=False))
    def test_the_order_of_input_does_not_matter(self, drawn, seed: int, shuffler: random.Random):
        keys, labels, groups = data_of(drawn)
        if not enough(keys, groups):
            return
        first = make_split(keys, labels, groups, seed=seed)
        shuffler.shuffle(keys)
        turned = dict(reversed(labels.items()))
        assert make_split(keys, turned, groups, seed=seed) == first

    def test_single_images_are_stratified_exactly(self):
        keys = [f"{label}{at}" for label in "abc" for at in range(20)]
        split = make_split(keys, {key: key[0] for key in keys}, {}, seed=1)
        for part, count in (("train", 10), ("val", 4), ("test", 6)):
            assert Counter(key[0] for key in getattr(split, part)) == dict.fromkeys("abc", count)

    def test_rare_classes_reach_as_many_parts_as_they_can(self):
        keys = [f"a{at}" for at in range(30)] + ["b0", "b1", "b2", "c0", "c1", "d0"]
        notices = Notices()
        split = make_split(keys, {key: key[0] for key in keys}, {}, seed=0, notices=notices)
        classes = {part: {key[0] for key in getattr(split, part)} for part in PARTS}
        assert classes["train"] == set("abcd")
        assert classes["test"] == set("abc")
        assert classes["val"] == set("ab")
        assert sum(notices.counts.values()) == 3

    def test_seeds_differ_and_repeat(self):
        keys = [f"{at:02d}" for at in range(40)]
        labels = dict.fromkeys(keys, "x")
        splits = [make_split(keys, labels, {}, seed=seed) for seed in (1, 1, 2)]
        assert splits[0] == splits[1]
        assert splits[0].train != splits[2].train
        assert splits[0].digest != splits[2].digest

    def test_parts_can_be_left_out(self):
        keys = [f"{at:02d}" for at in range(10)]
        split = make_split(keys, {}, {}, seed=0, val=0.0, test=0.5)
        assert (len(split.train), len(split.val), len(split.test)) == (5, 0, 5)
        for shares in ((0.5, 0.5), (-0.1, 0.5)):
            with pytest.raises(DataError, match="shares are val"):
                make_split(keys, {}, {}, seed=0, val=shares[0], test=shares[1])

    def test_lopsided_groups_still_fill_every_part(self):
        keys = [f"{at:03d}" for at in range(102)]
        groups = dict.fromkeys(keys[:100], "large")
        split = make_split(keys, {}, groups, seed=0)
        assert (len(split.train), len(split.val), len(split.test)) == (100, 1, 1)


class TestLeaks:
    def test_shared_images_groups_and_repeats_are_named(self):
        with pytest.raises(SplitLeakError, match=r"1 image of the part 'train' is in 'test', too"):
            Split(("a", "b"), (), ("b",), 0, "")
        with pytest.raises(SplitLeakError, match=r"1 group of the part 'train' .*\(e\.g\. g\)"):
            Split(("a",), (), ("b",), 0, "", groups={"a": "g", "b": "g"})
        with pytest.raises(SplitLeakError, match="'train' is in 'train'"):
            check_leaks({"train": ["a", "a"]}, {})

    def test_a_group_named_like_an_image_is_another_thing(self):
        split = Split(("a",), (), ("b",), 0, "", groups={"b": "a"})
        assert split.test == ("b",)


class TestFiles:
    def test_round_trip(self, tmp_path: Path):
        keys = [f"{at:02d}" for at in range(20)]
        groups = {key: key[0] + key[1] for key in keys[:10]}
        split = make_split(keys, dict.fromkeys(keys, "x"), groups, seed=3)
        write_split(tmp_path / "split.json", split)
        assert read_split(tmp_path / "split.json", keys=keys) == split
        assert sorted(path.name for path in tmp_path.iterdir()) == ["split.json"]

    def test_a_changed_file_is_noticed(self, tmp_path: Path):
        path = tmp_path / "split.json"
        write_split(path, Split(("a",), ("b",), ("c",), 0, ""))
        content = json.loads(path.read_text())
        content["splits"]["train"] = ["d"]
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="changed after it was written"):
            read_split(path)
        del content["digest"]
        path.write_text(json.dumps(content))
        assert read_split(path).train == ("d",)

    def test_layouts_of_others(self, tmp_path: Path):
        path = tmp_path / "splits.json"
        parts = {"train": ["b", "a"], "test": ["c"], "train_few": ["a"]}
        path.write_text(json.dumps({"splits": parts, "groups": {"a": "x"}, "counts": {}}))
        split = read_split(path)
        assert (split.train, split.val, split.test, split.seed) == (("a", "b"), (), ("c",), None)
        assert split.groups == {"a": "x"}
        few = read_split(path, train="train_few")
        assert few.train == ("a",)
        assert "train_few" in few.rule
        assert read_splits_json(path)[0]["train"] == ("b", "a")

    def test_tables(self, tmp_path: Path):
        path = tmp_path / "splits.csv"
        path.write_text("image,label,split,group\na.png,x,train,1\nb.png,y,val,\nc.png,y,test,2\n")
        split = read_split(path)
        assert (split.train, split.val, split.test) == (("a.png",), ("b.png",), ("c.png",))
        assert split.groups == {"a.png": "1", "c.png": "2"}

    def test_refusals(self, tmp_path: Path):
        path = tmp_path / "splits.json"
        with pytest.raises(DataError, match="There is no split"):
            read_split(path)
        for text in ("no json", "[]", '{"train": []}', '{"splits": 3}'):
            path.write_text(text)
            with pytest.raises(DataError, match="is no split"):
                read_split(path)
        path.write_text('{"splits": {"train": ["a"], "tset": ["b"]}}')
        with pytest.raises(DataError, match=r"no part 'test'\. Did you mean 'tset'"):
            read_split(path)
        path.write_text('{"splits": {"train": ["a"], "test": ["b"]}}')
        with pytest.raises(DataError, match=r"names 1 images that are not in the data, e\.g\. b"):
            read_split(path, keys=["a"])


def test_fixed_splits_of_real_data_are_read():
    data = Path(os.environ.get("DINO_ADAPTERS_DATA", "../shared/data"))
    if not (data / "ucmerced").is_dir() or not (data / "web_photos").is_dir():
        pytest.skip(f"the data sets ucmerced and web_photos are not in {data}")
    for name, file, counts in (
        ("ucmerced", "splits.json", (630, 210, 420)),
        ("web_photos", "splits.csv", (308, 75, 200)),
    ):
        source = open_source(data / name, labels="folder")
        split = read_split(data / name / file, keys=source.keys)
        assert (len(split.train), len(split.val), len(split.test)) == counts
        assert set(split.train) <= set(split.groups)

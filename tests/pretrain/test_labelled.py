"""The labelled set: two parts without a common group, cut evenly, and never the test images."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_adapters.contracts import RGB, BackboneInfo, Sample, SplitLeakError, UnreadableFileError
from dino_adapters.data import ImageSource, open_source
from dino_adapters.pretrain.labelled import TOO_FEW, LabelledSet, Squares, labelled_set
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices

INFO = BackboneInfo("stub", "timm", embed_dim=4, patch_size=8, depth=1, registers=0)


def world(counts, per_group=3, root="/data"):
    """Keys of so many images a class, in groups of a class, as a source that needs no files."""
    labels, groups = {}, {}
    for name, count in counts.items():
        for index in range(count):
            key = f"{name}/{index:04d}.png"
            labels[key] = name
            groups[key] = f"{name}-{index // per_group}"
    return ImageSource(Path(root), list(labels), {}, labels=labels, groups=groups)


def recipe(split=None, **monitor):
    split = None if split is None else str(split)
    told = {"data": {"source": "/data"}, "split": split, "monitor": monitor}
    return PretrainRecipe.model_validate(told)


def write_split(path, source, **parts):
    rest = [key for key in source.keys if not any(key in keys for keys in parts.values())]
    content = {"splits": {"train": [], "val": [], "test": rest, **parts}, "groups": {}}
    path.write_text(json.dumps(content))
    return path


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.integers(1, 6),
    st.integers(8, 120),
)
def test_no_group_is_in_both_parts_and_no_query_without_its_class(counts, per_group, most):
    source = world({f"c{i}": count for i, count in enumerate(counts)}, per_group)
    notices = Notices()
    found = labelled_set(recipe(labelled=most), source, notices)
    if found is None:
        assert any(line.startswith(TOO_FEW) for line in notices.counts)
        return
    gallery, queries = set(found.gallery), set(found.queries)
    assert not gallery & queries
    assert not set(found.groups_of(found.gallery)) & set(found.groups_of(found.queries))
    assert set(found.labels_of(found.queries)) <= set(found.labels_of(found.gallery))
    assert len(gallery) + len(queries) <= most
    assert len(queries) >= 10
    assert gallery | queries <= set(source.keys)
    assert all(found.labels[key] == source.labels[key] for key in gallery | queries)


def test_both_halves_hold_the_classes_alike():
    found = labelled_set(recipe(), world({"cat": 60, "dog": 30, "owl": 12}), Notices())
    assert found is not None
    for part in (found.gallery, found.queries):
        assert Counter(found.labels_of(part).tolist()) == {"cat": 30, "dog": 15, "owl": 6}


def test_nothing_labelled_is_none_without_a_word():
    notices = Notices()
    source = world({"cat": 30, "dog": 30})
    source.labels = {}
    assert labelled_set(recipe(), source, notices) is None
    assert notices.summary() == ()


@pytest.mark.parametrize(
    ("counts", "per_group", "said"),
    [
        ({"cat": 90}, 3, "all 90 are of the class 'cat', and two classes are needed"),
        ({"cat": 8, "dog": 8}, 1, "8 of 2 classes are left to judge on, beside 8 to learn from"),
        ({"cat": 40, "dog": 40}, 40, "no class has images of two groups, one to choose by"),
        ({"cat": 40, "dog": 40}, 20, "0 of 2 classes have images of two groups"),
    ],
)
def test_too_few_images_are_refused_with_the_reason(counts, per_group, said):
    notices = Notices()
    assert labelled_set(recipe(), world(counts, per_group), notices) is None
    (line,) = [line for line in notices.counts if line.startswith(TOO_FEW)]
    assert said in line


def test_the_cut_keeps_rare_classes_and_spreads_over_groups():
    notices = Notices()
    source = world({"cat": 600, "dog": 300, "owl": 12}, per_group=6)
    found = labelled_set(recipe(labelled=60), source, notices)
    assert found is not None
    taken = (*found.gallery, *found.queries)
    assert Counter(found.labels_of(taken).tolist()) == {"cat": 24, "dog": 24, "owl": 12}
    cats = [key for key in taken if found.labels[key] == "cat"]
    assert len(set(found.groups_of(cats))) == 24  # one image of a group, as there are enough
    assert notices.counts["labelled images beyond monitor.labelled left out"] == 912 - 60


def test_the_division_is_the_same_for_every_seed_and_order():
    source = world({"cat": 300, "dog": 200})
    first = labelled_set(recipe(labelled=80), source, Notices())
    told = recipe(labelled=80).model_copy(update={"seed": 7})
    second = labelled_set(told, source, Notices())
    assert first is not None
    assert second is not None
    assert first.digest == second.digest
    assert (first.gallery, first.queries) == (second.gallery, second.queries)
    other = labelled_set(recipe(labelled=78), source, Notices())
    assert other is not None
    assert other.digest != first.digest


def test_a_split_gives_train_and_val_and_never_test(tmp_path):
    source = world({"cat": 60, "dog": 60}, per_group=1)
    train = [key for key in source.keys if int(key[4:8]) < 20]
    val = [key for key in source.keys if 20 <= int(key[4:8]) < 35]
    split = write_split(tmp_path / "split.json", source, train=train, val=val)
    found = labelled_set(recipe(split), source, Notices())
    assert found is not None
    assert list(found.gallery) == train
    assert list(found.queries) == val
    assert not found.seen
    # The cut gives what one part does not need to the other.
    found = labelled_set(recipe(split, labelled=60), source, Notices())
    assert found is not None
    assert (len(found.gallery), len(found.queries)) == (30, 30)
    found = labelled_set(recipe(split, labelled=66), source, Notices())
    assert found is not None
    assert (len(found.gallery), len(found.queries)) == (36, 30)


def test_without_labels_in_val_the_training_part_is_divided(tmp_path):
    source = world({"cat": 60, "dog": 60})
    train = [key for key in source.keys if int(key[4:8]) < 30]
    split = write_split(tmp_path / "split.json", source, train=train)
    found = labelled_set(recipe(split), source, Notices())
    assert found is not None
    assert sorted((*found.gallery, *found.queries)) == train
    assert found.seen


def test_a_group_in_train_and_val_is_left_out_of_the_queries(tmp_path):
    source = world({"cat": 60, "dog": 60}, per_group=4)  # groups cross the line at 30
    train = [key for key in source.keys if int(key[4:8]) < 30]
    val = [key for key in source.keys if 30 <= int(key[4:8]) < 50]
    split = write_split(tmp_path / "split.json", source, train=train, val=val)
    notices = Notices()
    found = labelled_set(recipe(split), source, notices)
    assert found is not None
    assert len(found.queries) == 36
    assert sum("their group" in line for line in notices.counts) == 1


def test_classes_without_a_labelled_image_to_learn_from_are_not_asked_for(tmp_path):
    source = world({"cat": 60, "dog": 60, "owl": 12})
    train = [key for key in source.keys if int(key[4:8]) < 30 and "owl" not in key]
    val = [key for key in source.keys if int(key[4:8]) >= 30 or "owl" in key]
    val.remove("cat/0059.png")  # the file's reader wants a test part
    split = write_split(tmp_path / "split.json", source, train=train, val=val)
    notices = Notices()
    found = labelled_set(recipe(split), source, notices)
    assert found is not None
    assert "owl" not in set(found.labels.values())
    assert notices.examples["classes not asked for, as no image of them is learned from"] == ["owl"]


@pytest.fixture
def folders(tmp_path):
    """Unlabelled images, and others of two classes with a table of labels and groups."""
    for name in ("unlabelled", "labelled"):
        (tmp_path / name).mkdir()
        for index in range(40):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / name / f"{index:02d}.png")
    with (tmp_path / "labels.csv").open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(("path", "label", "group"))
        for index in range(40):
            writer.writerow((f"{index:02d}.png", "ab"[index % 2], f"g{index // 4}"))
    return tmp_path


def test_labels_may_come_from_elsewhere(folders):
    source = open_source(folders / "unlabelled")
    told = recipe(source=str(folders / "labelled"), labels=str(folders / "labels.csv"))
    found = labelled_set(told, source, Notices())
    assert found is not None
    assert not found.seen  # training never reads that folder
    assert len(found.gallery) == len(found.queries) == 20
    assert found.source.root == folders / "labelled"
    here = labelled_set(recipe(labels=str(folders / "labels.csv")), source, Notices())
    assert here is not None
    assert here.seen
    assert here.source is source
    assert set(found.groups.values()) == {f"group/g{number}" for number in range(10)}


def test_the_splits_test_images_stay_unread_under_another_name(folders):
    """The labelled folder is a parent of the run's: keys differ, files do not."""
    source = open_source(folders / "labelled")
    table = folders / "parent.csv"
    with table.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(("path", "label"))
        writer.writerows((f"labelled/{i:02d}.png", "ab"[i % 2]) for i in range(40))
    train, val = ([f"{i:02d}.png" for i in part] for part in (range(12), range(12, 26)))
    split = write_split(folders / "split.json", source, train=train, val=val)
    told = recipe(split, source=str(folders), labels=str(table))
    found = labelled_set(told, source, Notices())
    assert found is not None
    assert found.gallery == tuple(f"labelled/{key}" for key in train)
    assert found.queries == tuple(f"labelled/{key}" for key in val)
    assert not found.seen


def test_a_group_in_both_parts_cannot_be_built():
    source, notices = world({"cat": 4}), Notices()
    with pytest.raises(SplitLeakError, match="group"):
        LabelledSet(
            source,
            source.keys[:2],
            source.keys[2:],
            source.labels,
            dict.fromkeys(source.keys, "one"),
            seen=False,
            squares=Squares(source, notices),
            workers=0,
            max_unreadable=0.1,
            notices=notices,
        )


class Counting:
    """A source that counts reads; `sixteen` bits or eight, damaged where `broken`."""

    def __init__(self, *, dtype=np.uint8, broken=()):
        self.dtype, self.broken, self.reads = dtype, broken, Counter()

    def read(self, key):
        self.reads[key] += 1
        if key in self.broken:
            raise UnreadableFileError(f"{key} is truncated.")
        pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 30)).astype(self.dtype)
        bands = tuple(replace(band, low=0.0, high=255.0) for band in RGB)
        return Sample(key, pixels, bands)


@pytest.mark.parametrize(("dtype", "kept"), [(np.uint8, "uint8"), (np.uint16, "float32")])
def test_a_file_is_decoded_once_for_all_sizes(dtype, kept):
    source = Counting(dtype=dtype)
    squares = Squares(source, Notices())  # pyright: ignore[reportArgumentType]
    first = squares.get("a", INFO, (8, 16, 24))
    again = squares.get("a", INFO, (16,))
    assert first is not None
    assert again is not None
    assert source.reads["a"] == 1
    assert {size: tuple(square.shape) for size, square in first.items()} == {
        size: (3, size, size) for size in (8, 16, 24)
    }
    assert str(first[8].dtype) == f"torch.{kept}"
    assert again[16] is first[16]
    assert squares.get("a", replace(INFO, mean=(0.0, 0.0, 0.0)), (16,)) is not None
    assert source.reads["a"] == 2  # another normalisation fills what is missing otherwise


def test_pixels_are_those_of_the_file():
    source = Counting()
    found = Squares(source, Notices()).get("a", INFO, (24,))  # pyright: ignore[reportArgumentType]
    assert found is not None
    np.testing.assert_array_equal(found[24].numpy(), source.read("a").pixels[:, :, 3:27])


def test_what_does_not_fit_is_decoded_again():
    source = Counting()
    squares = Squares(source, Notices(), memory=3 * 8 * 8 + 10)  # pyright: ignore
    for _ in range(3):
        assert squares.get("a", INFO, (8,)) is not None
        assert squares.get("b", INFO, (8,)) is not None
    assert source.reads == {"a": 1, "b": 3}


def test_an_unreadable_file_is_tried_once_and_counted_once():
    notices = Notices()
    squares = Squares(Counting(broken=("a",)), notices)  # pyright: ignore[reportArgumentType]
    assert squares.get("a", INFO, (8,)) is None
    assert squares.get("a", INFO, (16,)) is None
    assert squares.unreadable == {"a"}
    assert notices.counts["unreadable labelled images left out"] == 1

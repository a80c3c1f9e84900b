"""Few-shot accuracies against a slow loop, and what the comparison promises."""

from dataclasses import replace

import numpy as np
import pytest

from dino_adapters.contracts import DataError, RecipeError, ShapeError
from dino_adapters.data.shots import draw_shots
from dino_adapters.study.fewshot import best_size, evaluate_shots
from dino_adapters.study.shot_table import FewShotTable


def slow_ncm(x, keys, labels, split, support):
    """Nearest class mean, one image at a time: centre on the pool, unit length, nearest mean."""
    at = {key: i for i, key in enumerate(keys)}
    centre = np.mean([x[at[key]].astype(float) for key in split.train], axis=0)

    def ready(key):
        vector = x[at[key]].astype(float) - centre
        return vector / np.linalg.norm(vector)

    recalls = {}
    for key in split.test:
        distances: dict[str, float] = {}
        for name in sorted(set(labels.values())):
            members = [ready(k) for k in support if labels[k] == name]
            distances[name] = float(np.linalg.norm(ready(key) - np.mean(members, axis=0)))
        recalls.setdefault(labels[key], []).append(
            min(distances, key=lambda name: distances[name]) == labels[key]
        )
    return np.mean([np.mean(right) for right in recalls.values()])


def test_equals_a_slow_loop(world):
    keys, labels, groups, split, vectors = world
    table = evaluate_shots(vectors, keys, labels, groups, split, shots=(1, 3), draws=3, seed=5)
    for row, x in vectors.items():
        for index in range(3):
            draw = draw_shots(split.train, labels, groups, shots=(1, 3), seed=5, draw=index)
            for shot in (1, 3):
                expected = slow_ncm(x, keys, labels, split, draw[shot])
                assert table.scores[row][shot][index] == pytest.approx(expected)
    assert table.support[2] == draw_shots(split.train, labels, groups, shots=(1, 3), seed=5, draw=2)


def test_a_row_does_not_depend_on_its_company(world):
    keys, labels, groups, split, vectors = world
    both = evaluate_shots(vectors, keys, labels, groups, split, draws=3)
    alone = evaluate_shots({"poor": vectors["poor"]}, keys, labels, groups, split, draws=3)
    for shot in both.shots:
        np.testing.assert_array_equal(both.scores["poor"][shot], alone.scores["poor"][shot])


def test_order_of_keys_does_not_matter(world):
    keys, labels, groups, split, vectors = world
    order = np.random.default_rng(1).permutation(len(keys))
    here = evaluate_shots(vectors, keys, labels, groups, split, draws=2)
    there = evaluate_shots(
        {row: x[order] for row, x in vectors.items()},
        [keys[i] for i in order],
        labels,
        groups,
        split,
        draws=2,
    )
    for row in vectors:
        np.testing.assert_allclose(here.scores[row][5], there.scores[row][5])


def test_test_images_change_nothing_but_themselves(world):
    """Support, centre and scaling see training images alone: a wild test image moves no answer."""
    keys, labels, groups, split, vectors = world
    x = vectors["good"].copy()
    victim = keys.index(split.test[0])
    x[victim] += 1000.0
    options = {"draws": 4, "standardised": ("row",)}
    here = evaluate_shots({"row": vectors["good"]}, keys, labels, groups, split, **options)
    there = evaluate_shots({"row": x}, keys, labels, groups, split, **options)
    others = np.array([key != split.test[0] for key in sorted(split.test)])
    for shot in here.shots:
        np.testing.assert_array_equal(
            here.correct["row"][shot][:, others], there.correct["row"][shot][:, others]
        )


def test_unlabelled_training_images_move_the_centre_alone(world):
    keys, labels, groups, split, vectors = world
    some = {key: name for key, name in labels.items() if key not in split.train[::2]}
    table = evaluate_shots(vectors, keys, some, groups, split, draws=2)
    used = {key for draw in table.support for picked in draw.values() for key in picked}
    assert used
    assert not used & set(split.train[::2])


def test_standardising_makes_units_irrelevant(world):
    keys, labels, groups, split, vectors = world
    x = vectors["good"]
    scaled = x * np.array([1, 1e4, 1, 1e-3, 1, 1, 50, 1], np.float32)
    plain = evaluate_shots(
        {"a": x, "b": scaled}, keys, labels, groups, split, draws=3, standardised=("a", "b")
    )
    for shot in plain.shots:
        np.testing.assert_allclose(plain.scores["a"][shot], plain.scores["b"][shot])


@pytest.mark.parametrize("head", ["knn", "linear"])
def test_other_heads_by_name(world, head):
    keys, labels, groups, split, vectors = world
    table = evaluate_shots(
        {"good": vectors["good"]}, keys, labels, groups, split, shots=(3,), draws=2, head=head
    )
    assert table.mean("good") > 0.6
    assert table.head == head


def test_a_class_without_labels_is_said_and_counted_wrong(world):
    keys, labels, groups, split, vectors = world
    blind = {k: v for k, v in labels.items() if v != "owl" or k in split.test}
    table = evaluate_shots({"good": vectors["good"]}, keys, blind, groups, split, draws=2)
    owls = table.query_labels == "owl"
    assert not table.correct["good"][5][:, owls].any()
    assert "'owl' had no labelled training image" in table.table().note


def test_a_class_with_few_images_is_said(world):
    keys, labels, groups, split, vectors = world
    kept = [k for k in split.train if labels[k] == "owl"][:2]
    few = {k: v for k, v in labels.items() if v != "owl" or k in kept or k in split.test}
    table = evaluate_shots({"good": vectors["good"]}, keys, few, groups, split, draws=2)
    assert "'owl' gave all labelled images, fewer than 5" in table.table().note


def test_best_size_takes_the_better_one_and_never_looks_at_test(world):
    keys, labels, groups, split, vectors = world
    spoiled = vectors["good"].copy()
    at = [keys.index(key) for key in split.test]
    spoiled[at] = np.random.default_rng(3).normal(size=spoiled[at].shape)
    choice = best_size(
        {64: vectors["poor"], 96: spoiled}, keys, labels, groups, split, shots=(1, 3), draws=4
    )
    assert choice.size == 96
    assert choice.scores[96] > choice.scores[64]


def test_best_size_of_equals_is_the_smaller(world):
    keys, labels, groups, split, vectors = world
    both = {224: vectors["good"], 112: vectors["good"]}
    assert best_size(both, keys, labels, groups, split, draws=2).size == 112


def test_best_size_of_one_needs_no_validation(world):
    keys, labels, groups, split, vectors = world
    alone = replace(split, val=(), digest="")
    assert best_size({96: vectors["good"]}, keys, labels, groups, alone).size == 96
    with pytest.raises(DataError, match="0 val images"):
        best_size({96: vectors["good"], 64: vectors["good"]}, keys, labels, groups, alone)
    with pytest.raises(DataError, match="No reading size"):
        best_size({}, keys, labels, groups, split)


def test_refusals(world):
    keys, labels, groups, split, vectors = world
    good = vectors["good"]

    def run(**changes):
        words = {"vectors": {"good": good}, "keys": keys, "labels": labels, "split": split}
        words |= changes
        return evaluate_shots(groups=groups, draws=1, **words)

    with pytest.raises(DataError, match=r"images of the split have no vectors \(first: "):
        run(keys=keys[1:], vectors={"good": good[1:]})
    with pytest.raises(DataError, match="test images have no label"):
        run(labels={k: v for k, v in labels.items() if k in split.train})
    with pytest.raises(DataError, match="No training image has a label"):
        run(labels={k: v for k, v in labels.items() if k in split.test})
    with pytest.raises(ShapeError, match=r"Row 'good' has shape \(89, 8\)"):
        run(vectors={"good": good[1:]})
    with pytest.raises(ShapeError, match="finite"):
        run(vectors={"good": np.where(good == good.max(), np.nan, good)})
    with pytest.raises(DataError, match="0 test images"):
        run(split=replace(split, test=(), digest=""))


def test_table_text(world):
    keys, labels, groups, split, vectors = world
    table = evaluate_shots(vectors, keys, labels, groups, split, draws=4)
    text = table.table()
    assert text.header == ("", "1-shot", "3-shot", "5-shot")
    assert [row[0] for row in text.rows] == ["good", "poor"]
    mean, low, high = table.interval("good", 3)
    assert text.rows[0][2] == f"{100 * mean:.1f} ± {50 * (high - low):.1f}"
    assert "chance 33.3" in text.note
    assert "4 draws" in text.note


def test_one_draw_has_no_interval(world):
    keys, labels, groups, split, vectors = world
    table = evaluate_shots(vectors, keys, labels, groups, split, draws=1)
    assert "±" not in "".join(table.table().rows[0])
    gain = table.paired("good", "poor")
    assert not gain.helps
    assert not gain.hurts
    assert "a single draw gives no interval" in gain.sentence()


def test_saved_and_loaded_is_the_same(world, tmp_path):
    keys, labels, groups, split, vectors = world
    table = evaluate_shots(vectors, keys, labels, groups, split, draws=3, seed=2)
    table.save(tmp_path / "fewshot.json")
    again = FewShotTable.load(tmp_path / "fewshot.json")
    assert again.as_json() == table.as_json()
    assert again.table() == table.table()
    assert again.paired("good", "poor") == table.paired("good", "poor")
    assert again.support == table.support


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "fewshot.json").write_text('{"shots": [1]}')
    with pytest.raises(DataError, match="no few-shot table"):
        FewShotTable.load(tmp_path / "fewshot.json")


def test_unknown_rows_and_shots(world):
    keys, labels, groups, split, vectors = world
    table = evaluate_shots(vectors, keys, labels, groups, split, draws=1)
    with pytest.raises(RecipeError, match="no row 'best'"):
        table.paired("best", "poor")
    with pytest.raises(RecipeError, match="no 2-shot column"):
        table.interval("good", 2)

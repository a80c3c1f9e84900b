"""k-NN and linear probe against slow references, and what choices may see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from dino_adapters.contracts import DataError
from dino_adapters.heads import WeightedKNN
from dino_adapters.measure.metrics import balanced_accuracy
from dino_adapters.pretrain import answers
from dino_adapters.pretrain.answers import (
    findable,
    held_out_knn,
    knn,
    linear_probe,
    mean_recall,
    shown_better,
)
from dino_adapters.runtime.console import Notices


def world(seed, count=60, width=12, classes=3, per_group=4, apart=2.0):
    rng = np.random.default_rng(seed)
    codes = np.arange(count) // per_group % classes
    x = rng.normal(size=(count, width)) + apart * np.eye(classes, width)[codes]
    groups = np.array([f"g{index // per_group}" for index in range(count)])
    return x.astype(np.float32), np.array(list("abcdefgh"))[codes], groups


def selection_score(x, labels, groups):
    asked = findable(labels, groups)
    return mean_recall(held_out_knn(x, labels, groups)[asked], labels[asked])


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 999), st.integers(4, 40))
def test_knn_is_that_of_the_heads(seed, count):
    bank, labels, _ = world(seed, count)
    x, _, _ = world(seed + 1000, 15)
    expected = WeightedKNN().fit(bank, labels).predict(x)
    np.testing.assert_array_equal(knn(bank, labels, x), expected)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 999), st.integers(1, 6))
def test_selection_equals_a_loop_over_images(seed, per_group):
    x, labels, groups = world(seed, 36, per_group=per_group)
    found = []
    for index in range(len(x)):
        others = groups != groups[index]
        found.append(WeightedKNN().fit(x[others], labels[others]).predict(x[index : index + 1])[0])
    expected = balanced_accuracy(labels, np.array(found))
    assert selection_score(x, labels, groups) == pytest.approx(expected)


def test_selection_does_not_depend_on_the_size_of_chunks(monkeypatch):
    x, labels, groups = world(3, 50)
    whole = selection_score(x, labels, groups)
    monkeypatch.setattr(answers, "CHUNK_CELLS", 7 * 50)
    assert selection_score(x, labels, groups) == whole


def test_near_twins_of_a_group_do_not_flatter():
    """Noise, but each group is one image three times: only other groups may vote."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(60, 16)), 3, axis=0)
    groups = np.repeat(np.arange(60).astype(str), 3)
    labels = np.repeat(np.array(["a", "b"])[rng.integers(0, 2, 60)], 3)
    alone = selection_score(x, labels, np.arange(180).astype(str))
    assert alone > 0.95
    assert abs(selection_score(x, labels, groups) - 0.5) < 0.15


def test_classes_of_one_group_are_not_asked_for_but_may_be_answered():
    x, labels, groups = world(1, 48, apart=50.0)
    lone, held = np.concatenate([labels, ["z"] * 20]), np.concatenate([groups, ["gz"] * 20])
    twins = np.concatenate([x, np.repeat(x[:4], 5, axis=0)])  # of images of class a
    assert selection_score(twins, lone, held) < 1.0
    far = np.concatenate([x, np.full((20, 12), -9.0, np.float32)])
    assert selection_score(far, lone, held) == 1.0
    with pytest.raises(DataError, match="No class has images of two groups"):
        findable(labels, labels)  # every class is one group


def test_collapsed_vectors_score_no_better_than_chance():
    _, labels, groups = world(0)
    assert selection_score(np.ones((60, 5), np.float32), labels, groups) < 0.4
    said, _ = linear_probe(
        np.ones((60, 5), np.float32), labels, groups, np.ones((9, 5), np.float32), Notices()
    )
    assert len(set(said.tolist())) == 1


@pytest.mark.parametrize("width", [6, 200])
def test_the_linear_probe_is_scikit_learns_on_standardised_columns(width):
    """The turned axes leave fit and answers as they are, whether n or D is larger."""
    bank, labels, groups = world(5, 60, width, apart=1.0)
    x, _, _ = world(6, 40, width, apart=1.0)
    said, strength = linear_probe(bank, labels, groups, x, Notices())
    scaler = StandardScaler().fit(bank.astype(np.float64))
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(bank.astype(np.float64)), labels)
    expected = model.predict(scaler.transform(x.astype(np.float64)))
    assert (said == expected).mean() >= 0.975  # answers on the border may fall either way


def test_the_strength_is_the_best_with_whole_groups_left_out():
    bank, labels, groups = world(2, 60, 30, apart=0.8)
    folds = answers._folds(labels, groups)
    assert set(folds) == {0, 1, 2}
    for name in np.unique(groups):
        assert len(set(folds[groups == name])) == 1
    for label in np.unique(labels):  # five groups a class
        counts = np.bincount([folds[groups == g][0] for g in np.unique(groups[labels == label])])
        assert counts.max() - counts.min() <= 1
    z = StandardScaler().fit_transform(bank.astype(np.float64))
    scores = []
    for strength in answers.STRENGTHS:
        found = labels.copy()
        for fold in range(3):
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
            model.fit(z[folds != fold], labels[folds != fold])
            found[folds == fold] = model.predict(z[folds == fold])
        scores.append(balanced_accuracy(labels, found))
    _, strength = linear_probe(bank, labels, groups, bank, Notices())
    assert strength == answers.STRENGTHS[int(np.argmax(scores))]


def test_rare_classes_are_heard():
    """Ninety of one class, ten of the other, overlapping: unweighted, nearly all would be `a`."""
    rng = np.random.default_rng(0)
    codes = np.r_[np.zeros(180, int), np.ones(20, int)]
    x = (rng.normal(size=(200, 3)) + 1.2 * codes[:, None] * np.eye(1, 3)).astype(np.float32)
    labels = np.array(["a", "b"])[codes]
    said, _ = linear_probe(x, labels, np.arange(200).astype(str), x, Notices())
    assert mean_recall(said == labels, labels) > 0.65
    assert (said == labels)[labels == "b"].mean() > 0.6


def test_a_column_that_is_constant_in_the_gallery_has_no_say():
    bank, labels, groups = world(7)
    x, _, _ = world(8)
    plain, _ = linear_probe(bank, labels, groups, x, Notices())
    bank_wide = np.concatenate([bank, np.ones((60, 1), np.float32)], axis=1)
    x_wide = np.concatenate([x, np.full((60, 1), 1e6, np.float32)], axis=1)
    wide, _ = linear_probe(bank_wide, labels, groups, x_wide, Notices())
    np.testing.assert_array_equal(plain, wide)


def test_a_fold_that_takes_all_of_the_other_class_is_survived():
    x, _, _ = world(0, 12)
    labels = np.array(list("aaaabbbbbbbb"))
    groups = np.array(list("111122223333"))
    said, strength = linear_probe(x, labels, groups, x, Notices())
    assert strength in answers.STRENGTHS
    assert set(said.tolist()) <= {"a", "b"}


def test_fits_that_do_not_converge_are_counted(monkeypatch):
    monkeypatch.setattr(answers, "MOST_ITERATIONS", 1)
    bank, labels, groups = world(0)
    notices = Notices()
    linear_probe(bank, labels, groups, bank, notices)
    assert notices.counts["linear probes that did not converge, taken as they were"] == 10


def test_answers_do_not_depend_on_the_other_queries():
    bank, labels, groups = world(4, apart=1.0)
    x, _, _ = world(5, apart=1.0)
    said, _ = linear_probe(bank, labels, groups, x, Notices())
    part, _ = linear_probe(bank, labels, groups, x[10:20], Notices())
    np.testing.assert_array_equal(part, said[10:20])
    np.testing.assert_array_equal(knn(bank, labels, x[10:20]), knn(bank, labels, x)[10:20])
    none, _ = linear_probe(bank, labels, groups, x[:0], Notices())
    assert len(none) == len(knn(bank, labels, x[:0])) == 0


def test_mean_recall_is_balanced_accuracy():
    rng = np.random.default_rng(0)
    truth, said = rng.choice(list("aaab"), 50), rng.choice(list("aaab"), 50)
    assert mean_recall(said == truth, truth) == pytest.approx(balanced_accuracy(truth, said))


@pytest.mark.parametrize("per_group", [1, 5])
def test_what_is_no_better_is_rarely_shown_to_be(per_group):
    """Of one in twenty at most; and a clear gain is shown."""
    rng = np.random.default_rng(0)
    labels, groups = np.tile(["a", "a", "b"], 50), np.arange(150) // per_group
    false, found = 0, 0
    for _ in range(400):
        wobble = rng.random(150 // per_group)[groups]  # images of a group are right together
        first, second = (rng.random((2, 150)) < 0.4 + 0.4 * wobble for _ in range(2))
        false += shown_better(second, first, labels, groups)
        found += shown_better(second | (rng.random((2, 150)) < 0.5), first, labels, groups)
    assert false / 400 < 0.05
    assert found / 400 > 0.95


def test_one_group_shows_nothing():
    right, wrong = np.ones((2, 6), dtype=bool), np.zeros((2, 6), dtype=bool)
    assert not shown_better(right, wrong, np.array(list("ababab")), np.zeros(6))
    assert shown_better(right, wrong, np.array(list("ababab")), np.arange(6))
    few = wrong.repeat(10, axis=1)
    few[:, :5] = True  # five of sixty, all for the better
    labels, before = np.array(list("ab" * 30)), np.zeros((2, 60), dtype=bool)
    assert not shown_better(few, before, labels, np.arange(60))
    few[:, :8] = True
    assert shown_better(few, before, labels, np.arange(60))

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import RecipeError, ShapeError
from dino_adapters.heads import NearestMean


def data(seed: int, counts: tuple[int, ...], width: int = 6):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    return rng.normal(size=(len(y), width)) + 3.0, y


def slow_scores(X, y, query, centre):
    def prepared(row):
        moved = row - centre
        length = np.sqrt(sum(moved**2))
        return moved / length if length else moved

    scores = []
    for name in sorted(set(y)):
        rows = [prepared(row) for row, own in zip(X, y, strict=True) if own == name]
        scores.append(-sum((prepared(query) - sum(rows) / len(rows)) ** 2))
    return scores


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.integers(0, 999),
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.sampled_from(["support", "array", None]),
)
def test_scores_equal_the_slow_loop(seed, counts, kind):
    X, y = data(seed, tuple(counts))
    queries, _ = data(seed + 1, (4, 3))
    unlabelled = np.full(6, 2.5)
    by_class = [X[y == number].mean(axis=0) for number in range(len(counts))]
    centre = {"support": np.mean(by_class, axis=0), "array": unlabelled, None: np.zeros(6)}[kind]
    head = NearestMean(unlabelled if kind == "array" else kind).fit(X, y)
    expected = np.array([slow_scores(X, y, query, centre) for query in queries])
    np.testing.assert_allclose(head.class_scores(queries), expected, atol=1e-9)
    assert np.array_equal(head.predict(queries), expected.argmax(axis=1))


def test_copies_of_one_classs_images_change_nothing():
    X, y = data(0, (4, 4, 4))
    copies = np.concatenate([X, np.repeat(X[y == 2], 9, axis=0)])
    more = NearestMean().fit(copies, np.concatenate([y, np.full(36, 2)]))
    queries, _ = data(1, (10, 10))
    once = NearestMean().fit(X, y)
    np.testing.assert_allclose(more.class_scores(queries), once.class_scores(queries), atol=1e-12)


def test_a_shift_shared_by_all_images_does_no_harm_when_centred():
    X, y = data(0, (5, 5))
    queries, _ = data(1, (10, 10))
    shift = 1000.0 * np.ones(6)
    plain, shifted = NearestMean().fit(X, y), NearestMean().fit(X + shift, y)
    assert np.array_equal(plain.predict(queries), shifted.predict(queries + shift))


def test_probabilities_follow_the_scores():
    X, y = data(0, (3, 3, 3))
    queries, _ = data(1, (5, 5))
    head = NearestMean().fit(X, y)
    found = head.predict_proba(queries)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    assert np.array_equal(found.argsort(axis=1), head.class_scores(queries).argsort(axis=1))


def test_unusable_options_are_refused():
    X, y = data(0, (2, 2))
    word: Any = "suport"
    with pytest.raises(RecipeError, match="centre is 'suport'"):
        NearestMean(word).fit(X, y)
    with pytest.raises(ShapeError, match=r"centre is \(3,\).*6 wide"):
        NearestMean(np.zeros(3)).fit(X, y)
    with pytest.raises(RecipeError, match="temperature"):
        NearestMean(temperature=0.0).fit(X, y)

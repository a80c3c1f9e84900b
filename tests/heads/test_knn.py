from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from dino_adapters.contracts import RecipeError
from dino_adapters.heads import WeightedKNN


def data(seed: int, count: int, width: int, classes: int):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    return rng.normal(size=(count, width)) + np.eye(classes, width)[y], y


def slow_votes(bank, y, query, k, temperature):
    cosines = [row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in bank]
    votes = np.zeros(len(set(y)))
    for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
        votes[y[index]] += np.exp(cosines[index] / temperature)
    return votes / votes.sum()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 15), st.sampled_from([0.07, 1.0]))
def test_votes_equal_the_slow_loop(seed, k, temperature):
    X, y = data(seed, 12, 5, 3)
    queries, _ = data(seed + 1, 7, 5, 3)
    head = WeightedKNN(k, temperature).fit(X, y)
    expected = [slow_votes(X, y, query, k, temperature) for query in queries]
    np.testing.assert_allclose(head.predict_proba(queries), expected, rtol=1e-5, atol=1e-9)
    assert head.k_ == min(k, 12)


def test_equals_scikit_learn_with_the_same_weights():
    X, y = data(0, 150, 16, 5)
    queries, _ = data(1, 80, 16, 5)
    votes: Any = lambda distances: np.exp((1.0 - distances) / 0.07)  # noqa: E731
    reference = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=votes)
    reference.fit(X, y)
    head = WeightedKNN(20).fit(X, y)
    np.testing.assert_allclose(
        head.predict_proba(queries), reference.predict_proba(queries), atol=1e-5
    )
    assert np.array_equal(head.predict(queries), reference.predict(queries))


def test_a_tiny_temperature_is_the_nearest_neighbour():
    X, y = data(0, 60, 8, 4)
    queries, _ = data(1, 30, 8, 4)
    sharp = WeightedKNN(20, temperature=1e-5).fit(X, y)
    assert np.isfinite(sharp.predict_proba(queries)).all()
    assert np.array_equal(sharp.predict(queries), WeightedKNN(1).fit(X, y).predict(queries))


def test_equal_votes_go_to_the_class_that_sorts_first():
    head = WeightedKNN(2).fit(np.array([[1.0, 0.0], [0.0, 1.0]]), ["oak", "ash"])
    assert head.predict(np.array([[1.0, 1.0]])).tolist() == ["ash"]


@pytest.mark.parametrize("options", [{"k": 0}, {"temperature": 0.0}])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(RecipeError, match="Use k of 1 or more"):
        WeightedKNN(**options).fit(*data(0, 6, 3, 2))

"""Mean intersection over union against sets of places."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from dino_adapters.contracts import DataError, ShapeError
from dino_adapters.measure.segmentation import mean_iou


def slow(predicted, truth, classes):
    places = [i for i in range(len(truth)) if truth[i] >= 0]
    shares = []
    for number in range(classes):
        found = {i for i in places if predicted[i] == number}
        true = {i for i in places if truth[i] == number}
        if found | true:
            shares.append(len(found & true) / len(found | true))
    return sum(shares) / len(shares)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 6))
def test_equals_the_slow_sets(seed, count, classes):
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, classes, count)
    truth = rng.integers(-1, classes, count)
    truth[0] = 0
    expected = slow(predicted, truth, classes)
    assert mean_iou(predicted, truth, classes) == pytest.approx(expected, abs=1e-12)


def test_equals_scikit_learn_where_every_class_occurs():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 4, (2, 20, 10))
    expected = jaccard_score(truth.ravel(), predicted.ravel(), average="macro")
    assert mean_iou(predicted, truth, 4) == pytest.approx(expected)


def test_classes_that_occur_nowhere_are_left_out_and_false_ones_are_not():
    truth = np.array([0, 0, 1, 1])
    assert mean_iou(truth, truth, 100) == 1.0
    assert mean_iou(np.array([0, 0, 1, 7]), truth, 100) == pytest.approx((1 + 0.5 + 0) / 3)


def test_small_integer_types_do_not_overflow():
    labels = np.arange(200, dtype=np.uint8)
    assert mean_iou(labels, labels, 200) == 1.0


def test_unlabelled_places_do_not_count():
    truth = np.array([0, 1, -1, -1])
    assert mean_iou(np.array([0, 1, 1, 0]), truth, 2) == 1.0


@pytest.mark.parametrize(
    ("predicted", "truth", "error", "match"),
    [
        ([0, 1], [0], ShapeError, "one label of each"),
        ([0.0, 1.0], [0, 1], DataError, "not their scores"),
        ([0, 3], [0, 1], DataError, "from 0 to 3 and there are 2"),
        ([0, 1], [0, 2], DataError, "from 0 to 2 and there are 2"),
        ([0, -1], [0, 1], DataError, "from -1 to 1"),
        ([0, 1], [-1, -1], DataError, "No place has a true label"),
    ],
)
def test_unfit_labels_are_refused(predicted, truth, error, match):
    with pytest.raises(error, match=match):
        mean_iou(np.array(predicted), np.array(truth), 2)

from typing import Any

import numpy as np
import pytest

from dino_adapters.contracts import UnknownNameError
from dino_adapters.features.pool import KINDS, unit_rows, vectors
from dino_adapters.features.store import StoredFeatures


@pytest.fixture
def stored() -> StoredFeatures:
    rng = np.random.default_rng(0)
    cls, mean = rng.normal(size=(2, 5, 8)).astype(np.float32)
    return StoredFeatures(tuple("abcde"), cls * 100.0, mean, None, (2, 2))


def test_single_kinds_are_the_stored_numbers(stored):
    assert np.array_equal(vectors(stored), stored.cls)
    assert np.array_equal(vectors(stored, "mean"), stored.mean)


def test_both_halves_weigh_the_same_whatever_their_scale(stored):
    both = vectors(stored, "cls_mean")
    assert both.shape == (5, 16)
    np.testing.assert_allclose(np.linalg.norm(both[:, :8], axis=1), np.sqrt(0.5), rtol=1e-6)
    cosines = [unit_rows(part) @ unit_rows(part).T for part in (stored.cls, stored.mean)]
    np.testing.assert_allclose(both @ both.T, (cosines[0] + cosines[1]) / 2, atol=1e-6)


def test_all_kinds_are_float32(stored):
    assert all(vectors(stored, kind).dtype == np.float32 for kind in KINDS)


def test_an_unknown_kind_names_the_nearest(stored):
    kind: Any = "cls_meen"
    with pytest.raises(UnknownNameError, match="Did you mean 'cls_mean'"):
        vectors(stored, kind)


def test_zero_rows_stay_zero():
    assert np.array_equal(unit_rows(np.zeros((2, 3), np.float32)), np.zeros((2, 3), np.float32))

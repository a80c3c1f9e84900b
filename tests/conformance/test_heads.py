"""What every registered head on vectors must do."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.exceptions import SkipTestWarning
from sklearn.utils.estimator_checks import check_estimator

from dino_adapters.contracts import ClassScores, NotFittedError, ShapeError, WeightsError
from dino_adapters.heads import NearestMean, load_head
from dino_adapters.runtime.lookup import HEADS, find

MAY_FAIL: dict[str, set[str]] = {}
"""Names of scikit-learn's checks that a head is known to fail, by head. Keep it empty."""

NAMES = sorted(HEADS.module_dict)


def data(seed: int = 0, classes: int = 3, count: int = 36):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    X = rng.normal(size=(count, 8)) + 2.0 * np.eye(classes, 8)[y] + 1.0
    return X.astype(np.float32), y


@pytest.fixture(params=NAMES)
def head(request) -> Any:
    return find(HEADS, request.param)()


def test_the_three_are_registered():
    assert {"knn", "linear", "ncm"} <= set(NAMES)


def test_scikit_learns_own_checks(head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        results: Any = check_estimator(head, on_fail=None)
    failed = {result["check_name"] for result in results if result["status"] == "failed"}
    name = next(name for name in NAMES if type(head) is find(HEADS, name))
    assert failed == MAY_FAIL.get(name, set())
    assert len(results) > 40


@pytest.mark.parametrize("labels", ["text", "numbers", "truth", "two"])
def test_saved_and_loaded_heads_say_the_same(head, tmp_path, labels):
    X, y = data(classes=2 if labels in ("truth", "two") else 3)
    kinds = {"text": np.array(["ash", "öak", "yew"])[y], "truth": y == 1}
    y = kinds.get(labels, y)
    queries, _ = data(1)
    head.fit(X, y)
    head.save(tmp_path / "head")
    for other in (type(head).load(tmp_path / "head"), load_head(tmp_path / "head")):
        assert type(other) is type(head)
        assert other.classes_.tolist() == head.classes_.tolist()
        assert np.array_equal(other.predict(queries), head.predict(queries))
        assert np.array_equal(other.predict_proba(queries), head.predict_proba(queries))
        assert str(other.get_params()) == str(head.get_params())
        for fact in head.facts:
            assert getattr(other, fact) == getattr(head, fact)


def test_a_given_centre_is_saved(tmp_path):
    X, y = data()
    saved = NearestMean(X.mean(axis=0)).fit(X, y).save(tmp_path)
    centre = NearestMean.load(saved).centre
    assert isinstance(centre, np.ndarray)
    assert np.array_equal(centre, X.mean(axis=0))


def test_an_image_is_judged_alone(head):
    X, y = data()
    queries, _ = data(1)
    head.fit(X, y)
    alone = np.concatenate([head.predict_proba(queries[i : i + 1]) for i in range(len(queries))])
    np.testing.assert_allclose(head.predict_proba(queries), alone, atol=1e-6)


def test_fitting_again_gives_the_same_bits(head):
    X, y = data()
    queries, _ = data(1)
    first = head.fit(X, y).predict_proba(queries)
    assert np.array_equal(first, head.fit(X, y).predict_proba(queries))
    copy: Any = clone(head)
    assert np.array_equal(first, copy.fit(X, y).predict_proba(queries))


def test_classes_apart_are_found(head):
    X, y = data(count=90)
    queries, truth = data(1, count=90)
    assert head.fit(X, y).score(queries, truth) > 0.75


def test_scores_carry_keys_and_class_names(head):
    X, y = data()
    keys = tuple(f"{i}.png" for i in range(len(X)))
    scores = head.fit(X, y).predict_scores(X, keys)
    assert isinstance(scores, ClassScores)
    assert scores.keys == keys
    assert scores.class_names == ("0", "1", "2")
    np.testing.assert_allclose(scores.scores.sum(axis=1), 1.0, rtol=1e-6)
    with pytest.raises(ShapeError, match="1 keys and 36 vectors"):
        head.predict_scores(X, ["a"])


@pytest.mark.parametrize("kind", [NotFittedError, SklearnNotFittedError])
def test_an_unfitted_head_says_so(head, kind, tmp_path):
    with pytest.raises(kind, match="learned nothing yet"):
        head.predict(data()[0])
    with pytest.raises(kind, match="learned nothing yet"):
        head.save(tmp_path)
    assert not list(tmp_path.iterdir())


class TestFilesThatDoNotFit:
    def test_another_backbone(self, head, tmp_path):
        head.fit(*data()).save(tmp_path, backbone_digest="aaa")
        with pytest.raises(WeightsError, match=r"backbone aaa, and this one is\s+bbb"):
            load_head(tmp_path, backbone_digest="bbb")
        assert load_head(tmp_path, backbone_digest="aaa").classes_.tolist() == [0, 1, 2]
        assert load_head(tmp_path).classes_.tolist() == [0, 1, 2]

    def test_another_kind(self, head, tmp_path):
        head.fit(*data()).save(tmp_path)
        other = next(find(HEADS, name) for name in NAMES if find(HEADS, name) is not type(head))
        with pytest.raises(WeightsError, match="load_head"):
            other.load(tmp_path)

    def test_saving_was_interrupted(self, head, tmp_path):
        head.fit(*data()).save(tmp_path)
        card = (tmp_path / "head.json").read_bytes()
        head.fit(*data(5)).save(tmp_path)
        (tmp_path / "head.json").write_bytes(card)
        with pytest.raises(WeightsError, match="interrupted"):
            load_head(tmp_path)

    def test_damaged_arrays(self, head, tmp_path):
        head.fit(*data()).save(tmp_path)
        (tmp_path / "head.safetensors").write_bytes(b"nothing")
        with pytest.raises(WeightsError, match="cannot be read"):
            load_head(tmp_path)

    def test_no_head_or_another_format(self, tmp_path):
        with pytest.raises(WeightsError, match="no saved head"):
            load_head(tmp_path)
        (tmp_path / "head.json").write_text(json.dumps({"format": 99}))
        with pytest.raises(WeightsError, match="format 1"):
            load_head(tmp_path)

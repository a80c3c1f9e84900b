from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dino_adapters.contracts import DataError, RecipeError, ShapeError
from dino_adapters.features.pool import unit_rows
from dino_adapters.heads import LinearProbe
from dino_adapters.heads.linear import FIXED_C, GRID, stratified_folds


def data(seed: int, count: int, width: int, classes: int, gap: float = 2.0):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    return rng.normal(size=(count, width)) + gap * np.eye(classes, width)[y], y


def scaled(X, train, kind):
    if kind == "none":
        return X
    if kind == "unit":
        return unit_rows(X - train.mean(axis=0))
    spread = train.std(axis=0)
    return (
        (X - train.mean(axis=0)) / np.maximum(spread, 0.1 * np.median(spread)) / X.shape[1] ** 0.5
    )


class TestSolution:
    @pytest.mark.parametrize("C", [1e-4, 1.0, 100.0])
    @pytest.mark.parametrize("kind", ["unit", "zscore", "none"])
    @pytest.mark.parametrize(("width", "classes"), [(5, 3), (90, 4), (90, 2)])
    def test_equals_scikit_learn_at_the_same_strength(self, C, kind, width, classes):
        X, y = data(0, 60, width, classes)
        queries, _ = data(1, 50, width, classes)
        probe = LinearProbe(C, scaling=kind, tol=1e-9).fit(X, y)
        reference = LogisticRegression(C=C, tol=1e-10, max_iter=20_000)
        reference.fit(scaled(X, X, kind), y)
        expected = reference.predict_proba(scaled(queries, X, kind))
        np.testing.assert_allclose(probe.predict_proba(queries), expected, atol=3e-5)
        assert probe.converged_
        assert (probe.C_, probe.chosen_by_, probe.at_edge_) == (C, "given", False)

    def test_a_dead_channel_among_zscores_is_not_blown_up(self):
        X, y = data(0, 60, 8, 3)
        X[:, 5] = 0.0
        queries, _ = data(1, 30, 8, 3)
        queries[:, 5] = 1e-3
        found = LinearProbe(1.0, scaling="zscore").fit(X, y)
        queries_clean = queries.copy()
        queries_clean[:, 5] = 0.0
        np.testing.assert_allclose(
            found.predict_proba(queries), found.predict_proba(queries_clean), atol=1e-3
        )

    def test_too_few_iterations_are_said(self, caplog):
        probe = LinearProbe(1e4, max_iter=2).fit(*data(0, 60, 5, 3))
        assert not probe.converged_
        assert "did not converge in 2 iterations" in caplog.text


class TestChoice:
    def test_the_grid_spans_what_was_promised(self):
        assert len(GRID) >= 20
        assert (GRID[0], GRID[-1]) == pytest.approx((1e-6, 1e4))

    def test_validation_picks_the_strength_of_the_least_balanced_loss(self):
        X, y = data(0, 40, 6, 3, gap=1.0)
        X_val, y_val = data(1, 70, 6, 3, gap=1.0)
        y_val = np.where(np.arange(70) < 20, 0, y_val)  # uneven, so that balancing matters
        grid = (0.01, 0.1, 1.0, 10.0, 1000.0)
        probe = LinearProbe(grid=grid).fit(X, y, X_val=X_val, y_val=y_val)
        losses = []
        for strength in grid:
            reference = LogisticRegression(C=strength, tol=1e-8, max_iter=20_000)
            reference.fit(scaled(X, X, "unit"), y)
            given = reference.predict_proba(scaled(X_val, X, "unit"))
            own = -np.log(given[np.arange(70), y_val])
            losses.append(np.mean([own[y_val == name].mean() for name in range(3)]))
        np.testing.assert_allclose(probe.losses_, losses, rtol=1e-3)
        assert int(np.argmin(losses)) == grid.index(probe.C_)
        assert probe.chosen_by_ == "validation"

    def test_folds_judge_each_image_by_a_fit_without_it(self):
        X, y = data(2, 30, 40, 3, gap=1.0)
        groups = np.array([f"g{i // 3}" for i in range(30)])
        grid = (0.1, 3.0, 100.0)
        probe = LinearProbe(grid=grid, folds=4, seed=5).fit(X, y, groups=groups)
        Z, own = scaled(X, X, "unit"), np.zeros((3, 30))
        for held in stratified_folds(y, groups, 4, 5):
            kept = np.setdiff1d(np.arange(30), held)
            assert not set(groups[kept]) & set(groups[held])
            for number, strength in enumerate(grid):
                reference = LogisticRegression(C=strength, tol=1e-8, max_iter=20_000)
                given = reference.fit(Z[kept], y[kept]).predict_proba(Z[held])
                own[number, held] = -np.log(given[np.arange(len(held)), y[held]])
        expected = [np.mean([row[y == name].mean() for name in range(3)]) for row in own]
        np.testing.assert_allclose(probe.losses_, expected, rtol=1e-3)
        assert probe.chosen_by_ == "folds"

    def test_one_label_a_class_fixes_the_strength_and_says_so(self):
        X, y = data(0, 13, 6, 3)
        y[:] = np.where(np.arange(13) == 12, 2, np.arange(13) % 2)
        probe = LinearProbe().fit(X, y)
        assert (probe.C_, probe.chosen_by_, len(probe.losses_)) == (FIXED_C, "fixed", 0)

    def test_one_group_a_class_does_too(self):
        X, y = data(0, 12, 6, 3)
        assert LinearProbe().fit(X, y, groups=y).chosen_by_ == "fixed"

    @pytest.mark.parametrize(
        ("gap", "grid", "chosen", "at_edge"),
        [
            # Labels of chance want small weights, classes far apart the largest there are.
            (0.0, (10.0, 1e2, 1e3), 10.0, True),
            (40.0, (1e-2, 1.0, 1e2), 1e2, True),
            (1.0, (1e-5, 1.0, 1e5), 1.0, False),
        ],
    )
    def test_the_edge_of_the_grid_is_told(self, gap, grid, chosen, at_edge):
        probe = LinearProbe(grid=grid).fit(*data(8, 60, 4, 3, gap=gap))
        assert (probe.C_, probe.at_edge_) == (chosen, at_edge)

    def test_the_seed_moves_the_folds(self):
        X, y = data(0, 30, 6, 3, gap=1.0)
        losses = [LinearProbe(seed=seed).fit(X, y).losses_ for seed in (0, 0, 1)]
        assert np.array_equal(losses[0], losses[1])
        assert not np.array_equal(losses[0], losses[2])


class TestFolds:
    def test_every_image_is_held_out_once_and_classes_are_spread(self):
        codes = np.repeat([0, 1], [20, 5])
        folds = list(stratified_folds(codes, None, 5, 0))
        assert sorted(np.concatenate(folds)) == list(range(25))
        assert all((codes[held] == 1).sum() == 1 for held in folds)

    def test_rare_classes_lower_their_number(self):
        assert len(list(stratified_folds(np.repeat([0, 1], [20, 3]), None, 5, 0))) == 3
        assert list(stratified_folds(np.repeat([0, 1], [20, 1]), None, 5, 0)) == []

    def test_a_fold_without_a_class_leaves_its_images_out(self):
        # Groups hold one class each, and both of class 2 may land in one fold.
        X, y = data(0, 24, 5, 3)
        order = np.argsort(y, kind="stable")
        X, y = X[order], y[order]
        groups = np.concatenate([np.arange(16) // 2, np.repeat([8, 9], [6, 2])])
        for seed in range(4):
            probe = LinearProbe(seed=seed).fit(X, y, groups=groups)
            assert np.isfinite(probe.losses_).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"C": 0.0}, "above 0"),
            ({"grid": ()}, "above 0"),
            ({"grid": (1.0, float("nan"))}, "finite"),
            ({"folds": 1}, "2 or more"),
            ({"scaling": "unti"}, "Use unit, zscore or none"),
        ],
    )
    def test_options(self, options: dict[str, Any], message):
        with pytest.raises(RecipeError, match=message):
            LinearProbe(**options).fit(*data(0, 12, 4, 2))

    def test_one_class(self):
        with pytest.raises(DataError, match="one class, '7'"):
            LinearProbe().fit(np.eye(4), [7, 7, 7, 7])

    def test_validation_that_does_not_fit(self):
        X, y = data(0, 12, 4, 2)
        probe = LinearProbe()
        with pytest.raises(DataError, match="does not: 5"):
            probe.fit(X, y, X_val=X[:2], y_val=[0, 5])
        with pytest.raises(ShapeError, match="width 4"):
            probe.fit(X, y, X_val=X[:2, :3], y_val=[0, 1])
        with pytest.raises(ShapeError, match="go together"):
            probe.fit(X, y, X_val=X[:2])
        with pytest.raises(ShapeError, match="3 groups and 12 images"):
            probe.fit(X, y, groups=[1, 2, 3])

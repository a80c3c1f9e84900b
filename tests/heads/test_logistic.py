import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dino_adapters.heads import logistic
from dino_adapters.heads.logistic import fit_logistic, minimise, row_space


def data(seed: int, count: int, width: int, classes: int):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    return rng.normal(size=(count, width)) + 1.5 * np.eye(classes, width)[y], y


class TestRowSpace:
    @pytest.mark.parametrize(("count", "width"), [(8, 30), (30, 8), (9, 9)])
    def test_is_a_rotation(self, count, width):
        X, _ = data(0, count, width, 2)
        Z, basis = row_space(X)
        assert Z.shape == (count, min(count, width))
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
        np.testing.assert_allclose(Z @ basis, X, atol=1e-12)

    def test_repeated_rows_do_no_harm(self):
        X = np.repeat(data(0, 3, 20, 2)[0], 4, axis=0)
        Z, basis = row_space(X)
        np.testing.assert_allclose(basis @ basis.T, np.eye(12), atol=1e-12)
        np.testing.assert_allclose(Z @ basis, X, atol=1e-12)


class TestFit:
    def test_every_problem_equals_scikit_learn_on_its_own_images(self):
        X, y = data(1, 60, 7, 4)
        rng = np.random.default_rng(2)
        strengths = np.array([1e-3, 0.1, 1.0, 30.0])
        members = rng.random((4, 60)) < 0.8
        found = fit_logistic(X, y, 4, strengths, members=members, tol=1e-9)
        assert found.converged.all()
        for number, (strength, member) in enumerate(zip(strengths, members, strict=True)):
            reference = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
            reference.fit(X[member], y[member])
            np.testing.assert_allclose(found.coef[number], reference.coef_, atol=1e-5)
            np.testing.assert_allclose(
                found.intercept[number] - found.intercept[number].mean(),
                reference.intercept_ - np.mean(reference.intercept_),
                atol=1e-5,
            )

    def test_the_gradient_is_that_of_the_loss(self):
        X, y = data(3, 20, 3, 3)
        members = np.random.default_rng(0).random((2, 20)) < 0.7
        rows = np.column_stack([X, np.ones(20)])
        problem = logistic._Problems(rows, y, 3, np.array([0.5, 3.0]), members)
        theta = np.random.default_rng(1).normal(size=(2, 12))
        heads = np.arange(2)
        _, gradient = problem.evaluate(theta, heads)
        for entry in range(12):
            step = np.zeros(12)
            step[entry] = 1e-6
            up, down = (problem.evaluate(theta + sign * step, heads)[0] for sign in (1, -1))
            np.testing.assert_allclose(gradient[:, entry], (up - down) / 2e-6, atol=1e-7)

    def test_chunks_change_nothing_that_matters(self, monkeypatch):
        X, y = data(4, 40, 6, 3)
        strengths = np.logspace(-2, 2, 9)
        whole = fit_logistic(X, y, 3, strengths, tol=1e-9)
        monkeypatch.setattr(logistic, "CHUNK_CELLS", 700)
        parts = fit_logistic(X, y, 3, strengths, tol=1e-9)
        np.testing.assert_allclose(parts.coef, whole.coef, atol=1e-6)

    def test_a_class_that_a_problem_lacks_is_left_out_of_it(self):
        X, y = data(5, 40, 5, 3)
        members = np.stack([y != 2, np.ones(40, dtype=bool)])
        found = fit_logistic(X, y, 3, np.array([1.0, 1.0]), members=members, tol=1e-9)
        assert found.converged.all()
        assert found.intercept[0, 2] == -np.inf
        assert np.isfinite(found.intercept[1]).all()
        # Two classes remain; scikit-learn's single weight vector is penalised twice as much.
        reference = LogisticRegression(C=2.0, tol=1e-10).fit(X[y != 2], y[y != 2])
        difference = found.coef[0, 1] - found.coef[0, 0]
        np.testing.assert_allclose(difference, reference.coef_[0], atol=1e-5)

    def test_too_few_iterations_are_said(self):
        X, y = data(6, 60, 7, 4)
        found = fit_logistic(X, y, 4, np.array([1e-6, 1e4]), tol=1e-8, max_iter=6)
        assert not found.converged[1]
        assert found.iterations[1] == 6


class TestMinimise:
    def test_quadratics_of_many_scales_at_once(self):
        rng = np.random.default_rng(0)
        curves = 10.0 ** rng.uniform(-2, 4, (5, 8))
        goals = rng.normal(size=(5, 8))

        def evaluate(theta, heads):
            away = theta - goals[heads]
            return 0.5 * (curves[heads] * away**2).sum(axis=1), curves[heads] * away

        found, solved, iterations = minimise(
            evaluate, np.zeros((5, 8)), np.ones((5, 8)), tol=1e-10, max_iter=2000
        )
        assert solved.all()
        np.testing.assert_allclose(found, goals, atol=1e-7)
        assert (iterations > 0).all()

    def test_a_solved_start_needs_no_iteration(self):
        def evaluate(theta, heads):
            return (theta**2).sum(axis=1), 2.0 * theta

        found, solved, iterations = minimise(
            evaluate, np.zeros((2, 3)), np.ones((2, 3)), tol=1e-8, max_iter=5
        )
        assert solved.all()
        assert not found.any()
        assert not iterations.any()

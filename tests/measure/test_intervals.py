import numpy as np
import pytest
from scipy import stats

from dino_adapters.contracts import DataError, ShapeError
from dino_adapters.measure import intervals
from dino_adapters.measure.intervals import (
    bootstrap,
    mean_interval,
    paired_bootstrap,
    paired_interval,
)


class TestStudent:
    def test_equals_scipy(self):
        values = np.random.default_rng(0).normal(3.0, 2.0, 12)
        for level in (0.95, 0.8):
            mean, low, high = mean_interval(values, level=level)
            expected = stats.t.interval(level, 11, loc=values.mean(), scale=stats.sem(values))
            assert mean == pytest.approx(values.mean())
            assert (low, high) == pytest.approx(expected)

    def test_a_pair_is_the_interval_of_its_differences(self):
        a, b = np.random.default_rng(1).normal(size=(2, 7))
        result = stats.ttest_rel(a, b).confidence_interval(0.95)
        mean, low, high = paired_interval(a, b)
        assert mean == pytest.approx((a - b).mean())
        assert (low, high) == pytest.approx((result.low, result.high))

    def test_five_draws_are_covered_as_often_as_promised(self):
        values = np.random.default_rng(2).normal(1.0, 3.0, (2000, 5))
        found = np.array([mean_interval(row) for row in values])
        coverage = ((found[:, 1] <= 1.0) & (found[:, 2] >= 1.0)).mean()
        assert abs(coverage - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)

    def test_a_single_value_has_no_width(self):
        assert mean_interval([0.7]) == (0.7, 0.7, 0.7)

    @pytest.mark.parametrize("values", [[], [0.1, float("nan")]])
    def test_missing_values_are_refused(self, values):
        with pytest.raises(DataError, match="all of them finite"):
            mean_interval(values)

    def test_unequal_pairs_are_refused(self):
        with pytest.raises(ShapeError, match="one value"):
            paired_interval([1.0, 2.0], [1.0])


def mean_of(values):
    return lambda weights: weights @ values / weights.sum(axis=1)


class TestBootstrap:
    def test_ends_are_percentiles_of_resampled_values(self):
        values = np.random.default_rng(0).normal(size=9)
        value, low, high = bootstrap(mean_of(values), 9, seed=4, resamples=300)
        drawn = np.random.default_rng(4).integers(0, 9, size=(300, 9))
        expected = np.quantile([values[units].mean() for units in drawn], [0.025, 0.975])
        assert value == pytest.approx(values.mean())
        assert (low, high) == pytest.approx(expected)

    def test_chunks_change_nothing(self, monkeypatch):
        values = np.random.default_rng(0).normal(size=9)
        whole = bootstrap(mean_of(values), 9, seed=4, resamples=100)
        monkeypatch.setattr(intervals, "CHUNK_CELLS", 63)
        assert bootstrap(mean_of(values), 9, seed=4, resamples=100) == whole

    def test_coverage_at_forty_units(self):
        rng = np.random.default_rng(5)
        covered = 0
        for seed in range(400):
            values = (rng.random(40) < 0.8).astype(float)
            _, low, high = bootstrap(mean_of(values), 40, seed=seed, resamples=400)
            covered += low <= 0.8 <= high
        # 4 standard errors below the 0.93 that such an interval really has at this size.
        assert 0.88 < covered / 400 < 0.99

    def test_an_undefined_value_stays_undefined_and_others_leave_it_out(self):
        def statistic(weights):
            first = np.where(weights[:, 0] > 0, 1.0, np.nan)
            return np.column_stack([first, np.full(len(weights), np.nan)])

        value, low, high = bootstrap(statistic, 3, seed=0, resamples=100)
        np.testing.assert_array_equal([value, low, high], [[1.0, np.nan]] * 3)

    def test_no_units_are_refused(self):
        with pytest.raises(DataError, match="0 units"):
            bootstrap(mean_of(np.zeros(0)), 0, seed=0)


def slow_paired(a, b, groups, labels, seed, resamples):
    """Images repeated one by one; the same draws as the fast one takes."""
    names = np.unique(groups)
    units = np.random.default_rng(seed).integers(0, len(names), size=(resamples, len(names)))
    draws = np.random.default_rng([seed, 1]).integers(0, len(a), size=(resamples, len(a)))
    values = []
    for unit, draw in zip(units, draws, strict=True):
        items = np.concatenate([np.flatnonzero(groups == names[u]) for u in unit])
        gains = (a[draw] - b[draw])[:, items].mean(axis=0)
        kinds = labels[items]
        values.append(np.mean([gains[kinds == kind].mean() for kind in np.unique(kinds)]))
    return np.quantile(values, [0.025, 0.975])


class TestPairedBootstrap:
    @pytest.fixture
    def answers(self):
        rng = np.random.default_rng(0)
        groups = np.array([f"g{i}" for i in rng.integers(0, 12, 50)])
        labels = np.array(["x", "y", "z"])[rng.integers(0, 3, 50)]
        a, b = (rng.random((2, 6, 50)) < np.array([0.8, 0.6])[:, None, None]).astype(float)
        return a, b, groups, labels

    @pytest.mark.parametrize("balanced", [True, False])
    def test_equals_the_slow_loop(self, answers, balanced):
        a, b, groups, labels = answers
        given = labels if balanced else None
        value, low, high = paired_bootstrap(a, b, groups, labels=given, seed=3, resamples=150)
        kinds = labels if balanced else np.zeros(50)
        expected = np.mean([(a - b)[:, kinds == kind].mean() for kind in np.unique(kinds)])
        assert value == pytest.approx(expected)
        assert (low, high) == pytest.approx(slow_paired(a, b, groups, kinds, 3, 150))

    def test_swapping_the_methods_turns_the_interval_round(self, answers):
        a, b, groups, labels = answers
        value, low, high = paired_bootstrap(a, b, groups, labels=labels)
        assert paired_bootstrap(b, a, groups, labels=labels) == pytest.approx((-value, -high, -low))

    def test_equal_methods_differ_by_nothing(self, answers):
        a, _, groups, _ = answers
        assert paired_bootstrap(a, a, groups) == (0.0, 0.0, 0.0)

    def test_one_draw_may_be_given_without_its_axis(self, answers):
        a, b, groups, _ = answers
        flat = paired_bootstrap(a[0], b[0], groups, seed=2)
        assert flat == paired_bootstrap(a[:1], b[:1], groups, over_draws=False, seed=2)

    def test_drawing_the_draws_too_widens_it(self, answers):
        a, b, groups, _ = answers
        a = a * (np.arange(6) < 3)[:, None]  # method A fails on half of the draws
        wide, narrow = (
            paired_bootstrap(a, b, groups, over_draws=over, seed=1) for over in (True, False)
        )
        assert wide[2] - wide[1] > 1.2 * (narrow[2] - narrow[1])

    def test_it_covers_where_the_t_interval_over_draws_does_not(self):
        # Ten draws on one test set of 40 images that favour one method by chance: the draws agree
        # with each other, so the t interval is sure of a difference that is not there.
        rng = np.random.default_rng(7)
        both, draws_only = 0, 0
        for seed in range(150):
            ease = rng.random((2, 40))
            a, b = ((rng.random((10, 40)) < side) for side in ease)
            _, low, high = paired_bootstrap(a, b, seed=seed, resamples=300)
            both += low <= 0.0 <= high
            _, low, high = paired_interval(a.mean(axis=1), b.mean(axis=1))
            draws_only += low <= 0.0 <= high
        assert both / 150 > 0.88
        assert draws_only / 150 < 0.8

    def test_unequal_shapes_are_refused(self, answers):
        a, b, groups, _ = answers
        with pytest.raises(ShapeError, match="same draws"):
            paired_bootstrap(a, b[:, :-1], groups)
        with pytest.raises(ShapeError, match="same draws"):
            paired_bootstrap(a, b, groups[:-1])

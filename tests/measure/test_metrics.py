import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from dino_adapters.contracts import DataError, ShapeError
from dino_adapters.measure import metrics
from dino_adapters.measure.metrics import classification_metrics

NAMES = ("ash", "beech", "cedar", "oak")
PAIRS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1)


def split(pairs):
    true, predicted = zip(*pairs, strict=True)
    return np.array(true), np.array(predicted)


class TestAgainstScikitLearn:
    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(PAIRS)
    def test_all_numbers(self, pairs):
        true, predicted = split(pairs)
        present = sorted(set(true))
        recalls = [(predicted[true == name] == name).mean() for name in present]
        assert metrics.accuracy(true, predicted) == pytest.approx((true == predicted).mean())
        assert metrics.balanced_accuracy(true, predicted) == pytest.approx(np.mean(recalls))
        # Its labels are all that occur on either side, which is what we average over, too.
        f1 = reference.f1_score(true, predicted, average="macro")
        assert metrics.macro_f1(true, predicted) == pytest.approx(f1)
        _, counts = metrics.confusion(true, predicted, NAMES)
        expected = reference.confusion_matrix(true, predicted, labels=list(NAMES))
        assert np.array_equal(counts, expected)


class TestAbsentClasses:
    def test_a_class_without_images_has_no_recall(self):
        names, recall, support = metrics.per_class_recall(["a", "a"], ["a", "b"], ["a", "b", "c"])
        assert names.tolist() == ["a", "b", "c"]
        np.testing.assert_array_equal(recall, [0.5, np.nan, np.nan])
        assert support.tolist() == [2, 0, 0]

    def test_f1_is_zero_if_only_predicted_and_missing_if_neither(self):
        _, f1 = metrics.per_class_f1(["a", "a"], ["a", "b"], ["a", "b", "c"])
        np.testing.assert_allclose(f1, [2 / 3, 0.0, np.nan])

    def test_it_does_not_lower_the_balanced_accuracy(self):
        assert metrics.balanced_accuracy(["a", "a", "c"], ["a", "b", "c"]) == 0.75

    def test_it_has_no_metric(self):
        found = classification_metrics(["a", "a"], ["a", "b"])
        names = [metric.name for metric in found]
        assert names == ["balanced_accuracy", "accuracy", "macro_f1", "recall/a"]

    def test_a_class_beyond_those_named_is_refused(self):
        with pytest.raises(DataError, match="'b' occurs"):
            metrics.confusion(["a"], ["b"], ["a", "c"])


class TestIntervals:
    @pytest.fixture
    def answers(self):
        rng = np.random.default_rng(0)
        true = np.array(NAMES)[rng.integers(0, 4, 60)]
        wrong = rng.random(60) < 0.4
        groups = np.array([f"g{i}" for i in rng.integers(0, 15, 60)])
        return true, np.where(wrong, "oak", true), groups

    def test_each_end_is_the_percentile_of_resampled_images_of_drawn_groups(self, answers):
        true, predicted, groups = answers
        found = classification_metrics(true, predicted, groups, seed=3, resamples=200)
        # The same draws, but images repeated one by one and judged anew.
        names = np.unique(groups)
        drawn = np.random.default_rng(3).integers(0, len(names), size=(200, len(names)))
        slow: dict[str, list[float]] = {metric.name: [] for metric in found}
        for units in drawn:
            rows = np.concatenate([np.flatnonzero(groups == names[unit]) for unit in units])
            t, p = true[rows], predicted[rows]
            slow["balanced_accuracy"].append(metrics.balanced_accuracy(t, p))
            slow["accuracy"].append(metrics.accuracy(t, p))
            slow["macro_f1"].append(metrics.macro_f1(t, p))
            for name, recall, _ in zip(*metrics.per_class_recall(t, p, NAMES), strict=True):
                slow[f"recall/{name}"].append(recall)
        for metric in found:
            ends = np.nanquantile(slow[metric.name], [0.025, 0.975])
            np.testing.assert_allclose([metric.low, metric.high], ends, err_msg=metric.name)
            assert metric.low <= metric.value <= metric.high

    def test_the_unit_and_its_count_are_said(self, answers):
        true, predicted, groups = answers
        by_group = classification_metrics(true, predicted, groups, resamples=10, split="val")
        assert {metric.unit for metric in by_group} == {"groups"}
        assert {metric.split for metric in by_group} == {"val"}
        assert by_group[0].count == len(set(groups))
        by_name = {metric.name: metric for metric in by_group}
        assert by_name["recall/oak"].count == len(set(groups[true == "oak"]))
        by_image = classification_metrics(true, predicted, resamples=10)
        assert (by_image[0].unit, by_image[0].count) == ("images", 60)

    def test_copies_in_groups_do_not_narrow_the_interval(self, answers):
        true, predicted, _ = answers
        single = classification_metrics(true, predicted, seed=1)
        copies = [np.repeat(array, 5) for array in (true, predicted, np.arange(60))]
        grouped = classification_metrics(*copies, seed=1)
        naive = classification_metrics(*copies[:2], seed=1)
        for one, many, blind in zip(single, grouped, naive, strict=True):
            assert (one.low, one.high) == pytest.approx((many.low, many.high))
            if one.high > one.low:
                assert blind.high - blind.low < one.high - one.low
        assert single[0].high > single[0].low

    def test_the_seed_decides(self, answers):
        true, predicted, _ = answers
        first, again = (classification_metrics(true, predicted, seed=5) for _ in range(2))
        assert first == again
        assert first != classification_metrics(true, predicted, seed=6)

    def test_many_classes_are_judged_in_parts(self, monkeypatch):
        rng = np.random.default_rng(0)
        true, predicted = rng.integers(0, 30, (2, 200))
        whole = classification_metrics(true, predicted, resamples=50)
        monkeypatch.setattr(metrics, "CHUNK_CELLS", 3000)
        assert classification_metrics(true, predicted, resamples=50) == whole


class TestRefusals:
    def test_lengths_differ(self):
        with pytest.raises(ShapeError, match="one of each"):
            metrics.accuracy(["a"], ["a", "b"])
        with pytest.raises(ShapeError, match="1 groups and 2 images"):
            classification_metrics(["a", "b"], ["a", "b"], ["g"])

    def test_no_images(self):
        with pytest.raises(DataError, match="no images"):
            metrics.balanced_accuracy([], [])

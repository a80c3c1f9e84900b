"""Differences of rows: their numbers against the definition, and their sentences."""

import numpy as np
import pytest
from scipy import stats

from dino_adapters.measure.intervals import LEAST_GROUPS
from dino_adapters.study.gain import Gain, as_start, gain


def made(shift, draws=10, queries=60, groups=20, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.array(["a", "b"] * (queries // 2))
    base = {k: generator.random((draws, queries)) < 0.5 for k in (1, 5)}
    up = {k: base[k] | (generator.random((draws, queries)) < shift) for k in base}
    score = lambda right: np.mean(  # noqa: E731
        [right[:, labels == name].mean(axis=1) for name in "ab"], axis=0
    )
    names = np.arange(queries) % groups
    return gain(
        "row",
        "baseline",
        {k: (score(up[k]), score(base[k])) for k in base},
        {k: (up[k], base[k]) for k in base},
        labels,
        names.astype(str),
    ), {k: score(up[k]) - score(base[k]) for k in base}


def test_pooled_interval_is_over_draws_of_the_mean_over_shots():
    found, differences = made(0.3)
    pooled = np.mean(list(differences.values()), axis=0)
    half = stats.t.ppf(0.975, 9) * pooled.std(ddof=1) / np.sqrt(10)
    mean = pooled.mean()
    assert found.pooled == pytest.approx((mean, mean - half, mean + half))
    assert found.shots[5][0] == pytest.approx(differences[5].mean())
    assert found.helps


def test_the_interval_over_test_images_has_the_same_centre_and_is_wider():
    found, _ = made(0.3)
    assert found.items is not None
    assert found.items[0] == pytest.approx(found.pooled[0])
    assert found.items[2] - found.items[1] > found.pooled[2] - found.pooled[1]


def test_too_few_groups_give_no_interval_over_test_images():
    found, _ = made(0.3, groups=LEAST_GROUPS - 1)
    assert found.items is None
    assert "too few to say more" in found.sentence()
    assert not found.helps


def test_a_gain_that_other_test_images_may_undo_is_no_gain():
    sure, wide = (0.041, 0.03, 0.052), (0.041, -0.016, 0.123)
    found = Gain("new net", "old net", 10, {1: sure}, sure, wide)
    assert not found.helps
    assert "cannot be told apart: +4.1 points" in found.sentence()
    mirrored = (-sure[0], -sure[2], -sure[1])
    assert not Gain("a b", "c", 10, {1: mirrored}, mirrored, wide).hurts


@pytest.mark.parametrize(
    ("pooled", "said"),
    [
        ((0.041, 0.03, 0.052), "New net beats old net by 4.1 points (95 % interval +3.0 to +5.2;"),
        ((-0.02, -0.03, -0.01), "New net falls behind old net by 2.0 points"),
        ((0.01, -0.01, 0.03), "New net and old net cannot be told apart: +1.0 points"),
    ],
)
def test_sentences(pooled, said):
    found = Gain("new net", "old net", 10, {1: pooled, 3: pooled, 5: pooled}, pooled, pooled)
    assert found.sentence().startswith(said)
    assert "1, 3 and 5 shots averaged, 10 paired draws" in found.sentence()


def test_identifiers_keep_their_case_at_the_start_of_a_sentence():
    assert as_start("raw pixels") == "Raw pixels"
    assert as_start("vitmicro8") == "vitmicro8"


def test_json_is_whole():
    found, _ = made(0.1)
    assert set(found.as_json()) == {"row", "baseline", "draws", "shots", "pooled", "items"}

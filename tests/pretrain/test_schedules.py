"""Schedules against slow references, at all their edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import RecipeError
from dino_adapters.pretrain.optim import Timetable
from dino_adapters.pretrain.schedules import (
    cosine_table,
    frozen_start,
    linear_rise,
    scaled_rate,
    warmup_cosine,
)
from dino_adapters.recipes.pretrain import PretrainRecipe

LEVELS = st.floats(-2, 2)


def slow_warmup_cosine(steps, start, peak, end, warmup, cosine):
    """Step by step, from the words: the last value of the cosine is `end`, if it has two."""
    values = []
    for step in range(steps):
        if step < warmup:
            values.append(start * (1 - step / warmup) + peak * (step / warmup))
        elif step >= warmup + cosine:
            values.append(end)
        elif cosine == 1:
            values.append(peak)
        else:
            angle = np.linspace(0, np.pi, cosine)[step - warmup]
            values.append(end * (1 - np.cos(angle)) / 2 + peak * (1 + np.cos(angle)) / 2)
    return values


def slow_cosine_table(steps, base, end, warmup, warmup_start, frozen, extra):
    left = steps - warmup - frozen
    if extra and left > 1:
        shape = np.cos(np.linspace(0, np.pi, int((1 + extra) * left)))[:left]
        cosine = np.interp(shape, [shape[-1], shape[0]], [end, base])
    else:
        cosine = end + (base - end) * (1 + np.cos(np.pi * np.arange(left) / max(left, 1))) / 2
    rise = np.linspace(warmup_start, base, warmup)
    return np.concatenate([np.zeros(frozen), rise, cosine]).tolist()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data(), st.integers(0, 30), LEVELS, LEVELS, LEVELS)
def test_warmup_cosine(data, steps, start, peak, end):
    warmup = data.draw(st.integers(0, steps))
    cosine = data.draw(st.none() | st.integers(0, steps - warmup))
    found = warmup_cosine(steps, start=start, peak=peak, end=end, warmup=warmup, cosine=cosine)
    told = steps - warmup if cosine is None else cosine
    expected = slow_warmup_cosine(steps, start, peak, end, warmup, told)
    assert len(found) == steps
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "warmup", "cosine", "expected"),
    [
        (1, 0, None, [1.0]),  # one step is the peak
        (1, 1, None, [0.5]),  # T = W: the peak is never reached
        (4, 4, None, [0.5, 0.625, 0.75, 0.875]),
        (4, 2, 0, [0.5, 0.75, 0.25, 0.25]),  # C = 0 jumps
        (4, 2, 1, [0.5, 0.75, 1.0, 0.25]),  # C = 1 is the peak, then jumps
        (4, 1, 3, [0.5, 1.0, 0.625, 0.25]),  # the last index holds the end
        (5, 0, 3, [1.0, 0.625, 0.25, 0.25, 0.25]),
        (0, 0, None, []),
    ],
)
def test_warmup_cosine_at_its_edges(steps, warmup, cosine, expected):
    found = warmup_cosine(steps, start=0.5, peak=1.0, end=0.25, warmup=warmup, cosine=cosine)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("warmup", "cosine"), [(11, None), (11, 0), (5, 6), (-1, 3), (3, -1)])
def test_parts_that_do_not_fit_are_refused(warmup, cosine):
    with pytest.raises(RecipeError, match=f"10 steps, with warmup {warmup}"):
        warmup_cosine(10, start=0, peak=1, end=0, warmup=warmup, cosine=cosine)


def test_a_peak_below_the_end_is_a_cosine_rise():
    found = warmup_cosine(10, start=0, peak=0, end=2.0, warmup=3, cosine=4)
    assert found[:4] == [0.0] * 4
    assert found == sorted(found)
    assert found[6:] == [2.0] * 4


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data(), st.integers(0, 30), LEVELS, LEVELS, LEVELS, st.sampled_from([0.0, 0.25, 1.5]))
def test_cosine_table(data, steps, base, end, warmup_start, extra):
    frozen = data.draw(st.integers(0, steps))
    warmup = data.draw(st.integers(0, steps - frozen))
    options = {"warmup": warmup, "warmup_start": warmup_start, "frozen": frozen, "extra": extra}
    found = cosine_table(steps, base=base, end=end, **options)
    expected = slow_cosine_table(steps, base, end, warmup, warmup_start, frozen, extra)
    assert len(found) == steps
    assert found == pytest.approx(expected, abs=1e-9)


def test_tables_worked_out_by_hand():
    plain = cosine_table(10, base=1.0, end=0.1, warmup=3)
    by_hand = [0, 0.5, 1, 1, 0.955, 0.831, 0.650, 0.450, 0.269, 0.145]
    assert plain == pytest.approx(by_hand, abs=6e-4)
    cut = cosine_table(10, base=1.0, end=0.1, warmup=3, extra=0.25)
    assert cut[3:] == pytest.approx([1, 0.953, 0.822, 0.632, 0.421, 0.231, 0.1], abs=6e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 1}, [1.0]),
        ({"steps": 1, "extra": 3.0}, [1.0]),
        ({"steps": 1, "warmup": 1}, [0.0]),
        ({"steps": 3, "warmup": 3}, [0.0, 0.5, 1.0]),
        ({"steps": 3, "frozen": 3}, [0.0] * 3),
        ({"steps": 2}, [1.0, 0.5]),  # the end itself would come third
        ({"steps": 2, "extra": 0.5}, [1.0, 0.0]),
    ],
)
def test_cosine_table_at_its_edges(options, expected):
    assert cosine_table(base=1.0, end=0.0, **options) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("options", [{"warmup": 5, "frozen": 6}, {"warmup": -1}, {"extra": -0.1}])
def test_a_cosine_table_that_cannot_be_is_refused(options):
    with pytest.raises(RecipeError, match="Give"):
        cosine_table(10, base=1.0, end=0.0, **options)


def test_linear_rise_holds_both_ends_then_stays():
    assert linear_rise(3, 5, 0.0, 1.0) == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert linear_rise(1, 2, 0.0, 1.0) == [0.0, 1.0]
    assert linear_rise(0, 2, 0.0, 1.0) == [1.0, 1.0]
    assert linear_rise(5, 2, 0.0, 1.0) == [0.0, 0.25]


def test_frozen_start_covers_no_more_than_the_table():
    assert frozen_start([1.0, 2.0, 3.0], 2) == [0.0, 0.0, 3.0]
    assert frozen_start([1.0, 2.0, 3.0], 0) == [1.0, 2.0, 3.0]
    assert frozen_start([1.0, 2.0, 3.0], 9) == [0.0] * 3


def test_rates_of_published_runs():
    """Peaks of DINOv3's ImageNet recipe and 7B run, and of DINO's."""
    assert scaled_rate(1e-3, 2048, "sqrt_1024") == pytest.approx(5.66e-3, rel=1e-3)
    assert scaled_rate(5e-5, 4096, "sqrt_1024") == pytest.approx(4e-4)
    assert scaled_rate(5e-4, 1024, "linear_256") == pytest.approx(2e-3)
    assert scaled_rate(1e-3, 7, "none") == 1e-3


@pytest.mark.parametrize(
    ("steps", "warmup"), [(steps, warmup) for steps in (1, 2, 7) for warmup in range(steps + 1)]
)
def test_values_of_a_run_are_those_of_the_tables(steps, warmup):
    """What training reads in a step is what the table of the family holds there."""
    for family, table in (
        ("v3", warmup_cosine(steps, start=0.0, peak=1.0, end=0.1, warmup=warmup)),
        ("v2", cosine_table(steps, base=1.0, end=0.1, warmup=warmup)),
    ):
        recipe = PretrainRecipe.model_validate(
            {
                "data": {"source": "x"},
                "steps": steps,
                "optim": {"lr": 1.0, "lr_end": 0.1},
                "schedule": {"family": family, "warmup": warmup / steps},
            }
        )
        found = [Timetable(recipe).at(step).lr for step in range(steps)]
        assert found == pytest.approx(table)

"""Charts: what is drawn, that it is the same each time, and that it asks nobody."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from dino_adapters.contracts import DataError
from dino_adapters.study.fewshot import evaluate_shots
from dino_adapters.study.figures import (
    PALETTE,
    _smooth,
    accuracy_over_time,
    loss_curves,
    shot_chart,
)


def rows(count=60, ibot=True):
    made = []
    for step in range(count):
        row = {"step": step, "images": 32 * (step + 1), "loss": 9 - step / count}
        row |= {"dino_global": 3.0, "dino_local": 3.1, "koleo": -0.4}
        if ibot:
            row["ibot"] = 5.0
        made.append(row)
    return made


@pytest.fixture
def table(world):
    keys, labels, groups, split, vectors = world
    return evaluate_shots(vectors, keys, labels, groups, split, draws=3)


def charts(table):
    yield loss_curves({"from nothing": rows()})
    yield loss_curves({"from nothing": rows(), "continued": rows(ibot=False)})
    yield shot_chart(table)
    points = [(0, 0.3, 0.2, 0.4), (60, 0.5, 0.4, 0.6)]
    yield accuracy_over_time({"continued": points}, floors={"statistics": 0.4})


def test_charts_are_svg_that_stands_alone(table):
    for figure in charts(table):
        root = ET.fromstring(figure.markup)
        assert root.tag.endswith("svg")
        assert root.get("viewBox")
        assert root.get("width") is None, "without a width it follows the page"
        assert root.get("role") == "img"
        assert figure.title[-1] == "."
        assert "Matplotlib" not in figure.markup, "no maker, no date: equal inputs, equal bytes"


def test_equal_inputs_give_equal_bytes(table):
    assert [f.markup for f in charts(table)] == [f.markup for f in charts(table)]


def test_ids_differ_between_charts_of_one_page(table):
    seen = set()
    for figure in charts(table):
        own = {e.get("id") for e in ET.fromstring(figure.markup).iter() if e.get("id")}
        assert not own & seen
        seen |= own


def test_references_inside_a_chart_lead_somewhere(table):
    for figure in charts(table):
        root = ET.fromstring(figure.markup)
        ids = {e.get("id") for e in root.iter()}
        wanted = {v[1:] for e in root.iter() for k, v in e.items() if k.endswith("href")}
        assert wanted
        assert wanted <= ids


def test_text_is_text_and_colours_follow_the_page(table):
    markup = shot_chart(table).markup
    assert "balanced accuracy in %" in markup
    assert "5-shot" in markup
    assert "var(--series-1" in markup
    assert "var(--ink" in markup
    for colour in PALETTE:
        assert markup.count(colour) == markup.count(PALETTE[colour])
    assert "#010203" not in markup


def test_a_term_that_nobody_has_is_left_out():
    assert "iBOT" in loss_curves({"a": rows()}).markup
    assert "iBOT" not in loss_curves({"a": rows(ibot=False)}).markup
    guided = [row | {"guide/site": 1.0} for row in rows()]
    assert "guide, site" in loss_curves({"a": guided}).markup


def test_titles_say_what_was_found(table):
    assert loss_curves({"a": rows()}).title.startswith("The loss fell from 8.98 to 8.03 over 1,920")
    two = loss_curves({"a": rows(), "b": rows()[::-1]}).title
    assert "a: the loss fell" in two
    assert "b: the loss rose" in two
    assert shot_chart(table).title == "Highest with few labels, on average: good."


def test_missing_numbers_leave_a_gap_and_not_a_crash():
    holes = [row | {"koleo": None} if row["step"] % 2 else row for row in rows()]
    assert "KoLeo" in loss_curves({"a": holes}).markup


def test_nothing_to_draw_is_said():
    with pytest.raises(DataError, match="fewer than two rows with a loss"):
        loss_curves({"a": rows()[:1]})
    with pytest.raises(DataError, match="no accuracy to draw"):
        accuracy_over_time({"a": []})


def test_running_mean_equals_a_loop():
    values = np.random.default_rng(0).normal(size=101)
    half = max(len(values) // 40, 1)
    for i, got in enumerate(_smooth(values)):
        reach = min(i, len(values) - 1 - i, half)
        assert got == pytest.approx(values[i - reach : i + reach + 1].mean())


def test_drawing_leaves_matplotlib_as_it_was(table):
    import matplotlib

    before = dict(matplotlib.rcParams)
    shot_chart(table)
    with pytest.raises(DataError):
        loss_curves({})
    assert dict(matplotlib.rcParams) == before

"""What the looks of a run say on its page."""

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from dino_adapters.contracts import DataError
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.figures import Panel, small_multiples
from dino_adapters.study.watched import (
    CHARTS,
    by_student,
    looks_of,
    skipped,
    steps_of,
    verdict,
    watched,
)

RECIPE = {
    "steps": 100,
    "crops": {"global_count": 2},
    "optim": {"batch_size": 8},
    "schedule": {"freeze_backbone": 0.0},
    "objective": {"prototypes": 64, "dino_weight": 1.0},
}
START = {
    "rankme": 20.0,
    "cls_cosine": 0.4,
    "cls_patch_cosine": 0.2,
    "patch_consistency": 0.9,
    "row_entropy": 4.0,
    "marginal_entropy": 4.1,
    "prototypes_used": 12.0,
    "prototypes_duplicated": 0.0,
    "knn": 0.5,
    "linear": 0.6,
    "selection": 0.55,
}
END = START | {"rankme": 31.5, "knn": 0.55, "linear": 0.62, "row_entropy": 2.0}


def look(step, signs=None, before="watch/", **more):
    return {"step": step} | {f"{before}{key}": v for key, v in ((signs or START) | more).items()}


def gain(value, reach=0.03) -> dict[str, Any]:
    return {"gain": value, "gain_low": value - reach, "gain_high": value + reach}


def steps(count=100, **terms):
    told = {"dino_global": 3.0, "koleo": 0.1} | terms
    return [{"step": s, "loss": 5.0, "images": 8 * (s + 1)} | told for s in range(count)]


ROWS = [look(0), *steps(), look(50, **gain(0.01)), look(100, END, **gain(0.04))]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def texts(figure):
    return [e.text for e in ET.fromstring(figure.markup).iter() if e.text and e.text.strip()]


# Rows


def test_rows_are_steps_or_looks():
    assert [row["step"] for row in looks_of(ROWS)] == [0, 50, 100]
    assert looks_of(ROWS)[2]["gain_low"] == pytest.approx(0.01)
    assert [row["step"] for row in steps_of(ROWS)] == list(range(100))
    refused = [{"step": 3, "loss": None, "images": 8}, {"step": 4, "loss": 2.0, "skipped": 1}]
    assert steps_of(refused) == []


def test_skipped_steps_are_named():
    assert skipped(ROWS) == ()
    one = [{"step": 1_200, "skipped": 1}]
    assert skipped(one) == ("Step 1,200 was left out, as its loss or gradient was not finite.",)
    many = [{"step": s, "skipped": s + 1} for s in range(7)]
    assert skipped(many)[0].startswith("7 steps were left out")
    assert skipped(many)[0].endswith(": 0, 1, 2, 3, 4, ….")


def test_students_are_told_apart_from_looks_and_guides():
    rows = [{"step": 0, "guide/species": 1.0, "watch/rankme": 2.0}]
    assert by_student("phase", rows) == {"phase": rows}
    rows = [{"step": 0, "b/koleo": 1.0, "a/koleo": 2.0, "watch/rankme": 3.0}]
    assert list(by_student("phase", rows)) == ["phase: a", "phase: b"]
    assert list(by_student("", rows)) == ["a", "b"]


# Parts of the page


def test_every_sign_has_a_chart_and_a_line_of_the_table(folder):
    seen = watched(folder, RECIPE, ROWS)
    assert seen.notes == seen.alarms == ()
    (figure,), (table,) = seen.figures, seen.tables
    drawn = texts(figure)
    assert all(title in drawn for title in CHARTS)
    assert "log K" in drawn
    assert (
        figure.title
        == "The looks saw k-NN from 50.0 to 55.0 % and linear probe from 60.0 to 62.0 %."
    )
    assert "Good: probes and RankMe rise" in figure.caption
    assert table.header == ("", "step 0", "step 100", "good")
    rows = {row[0]: row[1:] for row in table.rows}
    assert len(rows) == sum(len(signs) for signs in CHARTS.values())
    assert rows["RankMe"] == ("20.0", "31.5", "rises, or holds")
    assert rows["probes to judge by, less the start, in points"][:2] == ("", "+4.0 (+1.0 to +7.0)")
    assert rows["labelled images, balanced accuracy in %: k-NN, to judge by"][:2] == (
        "50.0",
        "55.0",
    )
    assert rows["prototypes in use"][:2] == ("12", "12")


def test_without_labels_and_heads_the_rest_is_shown(folder):
    signs = {"rankme": 20.0, "cls_cosine": 0.4}
    rows = [look(0, signs), look(100, signs, rankme=None, cls_cosine=0.3)]
    seen = watched(folder, {}, rows)
    assert [row[0] for row in seen.tables[0].rows] == ["cosine of class tokens: with other images"]
    assert seen.figures[0].title == "What the looks saw."
    assert "RankMe" not in texts(seen.figures[0])


@pytest.mark.parametrize("rows", [[], steps(), [look(0)], [look(0), *steps()]])
def test_fewer_than_two_looks_draw_nothing(folder, rows):
    seen = watched(folder, RECIPE, rows)
    assert seen.figures == seen.tables == ()


def test_findings_go_to_the_top_or_to_the_notes(folder):
    flat = steps(dino_global=4.16)
    rows = [look(0), *flat, look(100, rankme=1.1), {"step": 4, "skipped": 1}]
    seen = watched(folder, RECIPE, rows, name="first")
    assert len(seen.alarms) == 1
    assert seen.alarms[0].startswith("first: All images get nearly the same output: RankMe is 1.1")
    assert [note[:24] for note in seen.notes] == [
        "first: The DINO term sto",
        "first: Step 4 was left o",
    ]
    assert seen.figures[0].title.startswith("first: The looks saw")
    assert seen.tables[0].title == "first: Signs of health"


def test_the_number_of_images_comes_from_the_card(folder):
    """In the first pass nothing is said of a loss at log K."""
    flat = steps(dino_global=4.16)
    assert len(watched(folder, RECIPE, flat).notes) == 1
    folder.export.mkdir()
    card = folder.export / "card.json"
    card.write_text(json.dumps({"training": {"images": 100_000}}))
    assert watched(folder, RECIPE, flat).notes == ()
    card.write_text("{}")
    assert len(watched(folder, RECIPE, flat).notes) == 1
    card.unlink()
    (folder.export / "a").mkdir()
    (folder.export / "a" / "card.json").write_text(json.dumps({"training": {"images": 100_000}}))
    assert watched(folder, RECIPE, flat).notes == ()


def test_the_freeze_is_that_of_the_recipe(folder):
    rows = [look(0), look(50, rankme=1.1)]
    assert len(watched(folder, RECIPE, rows).alarms) == 1
    frozen = RECIPE | {"schedule": {"freeze_backbone": 0.5}}
    assert watched(folder, frozen, rows).alarms == ()


def test_looks_of_a_distillation_are_shown_once(folder):
    terms: dict[str, Any] = {"a/dino_global": 4.16, "b/dino_global": 2.0}
    rows = [look(0), *steps(**terms), look(100, END)]
    seen = watched(folder, RECIPE, rows, name="distill")
    assert [table.title for table in seen.tables] == ["distill: Signs of health"]
    assert len(seen.notes) == 1
    assert seen.notes[0].startswith("distill: a: The DINO term stood")
    own = [look(0, before="b/watch/"), *steps(**terms), look(100, END, before="b/watch/")]
    titles = [figure.title for figure in watched(folder, RECIPE, own).figures]
    assert [title[:16] for title in titles] == ["b: The looks saw"]


def test_the_verdict_is_the_gates(folder):
    assert verdict(folder) == ()
    (folder.path / "gate.json").write_text(json.dumps({"sentence": "Better.", "kind": "better"}))
    assert verdict(folder) == ("Better.",)
    for damaged in ("{", "{}"):
        (folder.path / "gate.json").write_text(damaged)
        with pytest.raises(DataError, match=r"gate\.json cannot be read"):
            verdict(folder)


# The picture


def test_small_charts_keep_lines_levels_and_bands():
    panels = [
        Panel("one", {"up": [(0, 1), (10, 2)]}),
        Panel("two", {"a": [(0, 1, 0, 2), (10, 2, 1, 3)], "b": [(0, 0), (10, 1)]}, {"roof": 3.0}),
        Panel("three", {"up": [(0, 1), (10, 2)]}, {"up": 1.0}),
        Panel("four", {"up": [(0, 1), (10, 2)]}),
    ]
    figure = small_multiples(panels, unit="steps", title="Four charts.", caption="Good: up.")
    drawn = texts(figure)
    assert {"one", "two", "three", "four", "a", "b", "roof"} <= set(drawn)
    assert "up" not in drawn, "a single line needs no legend"
    assert drawn.count("steps") == 3, "the lowest chart of each column names the axis"
    assert (figure.title, figure.caption) == ("Four charts.", "Good: up.")
    again = small_multiples(panels, unit="steps", title="Four charts.", caption="Good: up.")
    assert again.markup == figure.markup


def test_no_chart_is_said():
    with pytest.raises(DataError, match="nothing to draw"):
        small_multiples([], unit="steps", title="", caption="")

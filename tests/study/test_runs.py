"""Reports of runs: what they say, what they warn of, and how to repeat the run."""

import pytest

from dino_adapters.contracts import DataError, Metric
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.page import write_page
from dino_adapters.study.runs import headline, metric_table, run_report

RECIPE = {
    "model": {"source": "vitmicro8"},
    "objective": {"prototypes": 1024, "dino_weight": 1.0},
    "steps": 10,
}


def made(tmp_path, last_dino=4.0, steps=10, overrides=("steps=10",), **recipe):
    folder = RunFolder(tmp_path / "run")
    folder.begin(RECIPE | recipe, overrides)
    for step in range(steps):
        dino = 6.9 + (last_dino - 6.9) * step / max(steps - 1, 1)
        row = {"step": step, "loss": dino, "dino_global": dino, "lr": 1e-6}
        folder.note(row | {"images": 8 * (step + 1), "seconds": float(step)})
    return folder


def test_a_finished_run(tmp_path):
    folder = made(tmp_path)
    folder.export.mkdir()
    report = run_report(folder)
    assert "for 10 of 10 steps: 80 images seen in 9 s" in report.summary[0]
    assert "export" in report.summary[1]
    assert report.notes == ()
    rows = {row[0]: row[1] for row in report.tables[0].rows}
    assert rows["learning rate"] == "1e-06"
    assert rows["images seen"] == "80"


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    report = run_report(made(tmp_path, steps=4))
    assert "4 of 10 steps" in report.summary[0]
    assert "--resume" in report.summary[1]


def test_a_run_that_learned_nothing_is_not_praised(tmp_path):
    report = run_report(made(tmp_path, last_dino=6.93))
    assert report.notes[0].startswith("The DINO term stood at 6.92 over the last third")


def test_looks_skipped_steps_and_the_verdict_are_on_the_page(tmp_path):
    folder = made(tmp_path)
    for step, rankme in ((0, 20.0), (5, 15.0), (10, 1.2)):
        folder.note({"step": step, "watch/rankme": rankme, "watch/cls_cosine": 0.3})
    folder.note({"step": 7, "loss": None, "images": 64, "skipped": 1})
    (folder.path / "gate.json").write_text('{"sentence": "Worse than the start."}')
    report = run_report(folder)
    assert report.summary[0] == "Worse than the start."
    assert "RankMe is 1.2 (20.0 at the start" in report.summary[3]
    assert report.notes == ("Step 7 was left out, as its loss or gradient was not finite.",)
    assert [table.title for table in report.tables] == ["Signs of health", "The last numbers noted"]
    assert report.tables[1].rows[0] == ("step", "9"), "a look is no step"
    assert report.figures[1].title == "The looks saw RankMe from 20.0 to 1.2."
    assert write_page(report, tmp_path / "page.html").read_text().count("<svg") == 2


def test_the_command_repeats_the_run(tmp_path):
    folder = made(tmp_path, overrides=("data.source=photos", "steps=10"))
    told = run_report(folder).provenance
    assert told["command"] == f"dino-adapters pretrain {folder.recipe_file} --out runs/again"
    assert told["overrides given"] == "data.source=photos steps=10"
    assert told["recipe"] == RECIPE
    assert told["environment"]["python"]


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        run_report(RunFolder(tmp_path))
    with pytest.raises(DataError, match="fewer than two rows"):
        run_report(made(tmp_path, steps=1))
    task = RunFolder(tmp_path / "task")
    task.begin({"backbone": "vitmicro8"})
    with pytest.raises(DataError, match="dino-adapters evaluate"):
        run_report(task)
    other = RunFolder(tmp_path / "other")
    other.begin({"what": "else"})
    with pytest.raises(DataError, match="another kind"):
        run_report(other)
    task.recipe_file.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        run_report(task)


def test_metrics_in_words():
    metrics = (
        Metric("balanced_accuracy", 0.5, 0.4, 0.6, 12, "groups"),
        Metric("macro_f1", 0.45, 0.35, 0.55, 12, "groups"),
        Metric("recall/sparse_residential", 1.0, 1.0, 1.0, 3, "groups"),
    )
    table = metric_table(metrics)
    assert [row[0] for row in table.rows] == [
        "balanced accuracy",
        "macro F1",
        "recall of sparse_residential",
    ]
    assert table.rows[0][1:] == ("50.0", "40.0 to 60.0", "12 groups")
    assert "bootstrap over groups" in table.note
    assert "50.0 % balanced accuracy on the test images (95 % interval 40.0 to 60.0" in headline(
        "net", "knn", metrics
    )

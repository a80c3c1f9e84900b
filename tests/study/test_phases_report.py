"""The report of a run in phases."""

from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.runs import run_report


def noted(**terms):
    return [
        {"step": step, "loss": 3.0 - step, "images": 4 * step, "seconds": 1.0 * step}
        | {name: value - 0.1 * step for name, value in terms.items()}
        for step in range(4)
    ]


def phased(tmp_path, *, ended):
    folder = RunFolder(tmp_path / "run")
    names = ["pretrain", "gram", "distill"]
    told = {"steps": 4, "phases": [{"name": name} for name in names]}
    folder.begin(told)
    rows = [noted(koleo=1.0), noted(gram=0.5), noted(**{"a/koleo": 1.0, "b/koleo": 2.0})]
    for index, (name, notes) in enumerate(zip(names, rows, strict=True), start=1):
        part = folder.phase(index, name)
        part.begin({"steps": 4})
        for row in notes:
            part.note(row)
        if name in ended:
            part.export.mkdir()
    return folder


def test_each_phase_and_each_student_has_a_curve_and_a_table(tmp_path):
    report = run_report(phased(tmp_path, ended=["pretrain", "gram", "distill"]))
    assert report.title == "Pretraining in 3 phases"
    assert report.summary[0] == (
        "3 of 3 phases done: pretrain, gram, distill. Losses of different phases have different "
        "terms and weights."
    )
    (table,) = report.tables
    assert table.header == ("", "pretrain", "gram", "distill")
    numbers = {row[0]: row[1:] for row in table.rows}
    assert numbers["KoLeo"] == ("0.7", "", "")
    assert numbers["b: KoLeo"] == ("", "", "1.7")
    drawn = str(report.figures[0])
    assert all(name in drawn for name in ("distill: a", "distill: b", "pretrain"))


def test_phases_that_wait_are_named(tmp_path):
    report = run_report(phased(tmp_path, ended=["pretrain"]))
    assert "Not done yet: gram, distill." in report.summary[1]


def test_phases_are_in_the_order_of_their_numbers(tmp_path):
    folder = RunFolder(tmp_path)
    for index in (10, 2, 1):
        folder.phase(index, f"p_{index}").path.mkdir(parents=True)
    assert list(folder.phases) == ["p_1", "p_2", "p_10"]


def test_several_students_are_named_one_by_one(tmp_path):
    folder = phased(tmp_path, ended=["pretrain", "gram", "distill"])
    for name in ("b", "a"):
        (folder.export / name).mkdir(parents=True)
        (folder.export / name / "card.json").write_text("{}")
    assert run_report(folder).summary[1] == (
        "The frozen backbones are in export/a, export/b; load_backbone opens each."
    )

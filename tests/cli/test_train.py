"""pretrain, export, report: a tiny run from the command line."""

import json

import pytest

TINY = (
    "model.source=vitmicro8",
    "crops.global_size=32",
    "crops.local_size=16",
    "crops.local_count=2",
    "objective.prototypes=32",
    "objective.hidden_dim=16",
    "objective.bottleneck_dim=8",
    "optim.batch_size=4",
    "checkpoint.every_steps=2",
    "device=cpu",
)


@pytest.fixture
def trained(run, photos, tmp_path):
    out = tmp_path / "run"
    result = run("pretrain", f"data.source={photos}", *TINY, "steps=4", "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    return out, result


def test_pretrain_says_where_the_backbone_is(trained):
    out, result = trained
    assert f"A frozen backbone is in {out / 'export'}." in result.stdout
    assert (out / "export" / "card.json").exists()
    assert "steps=4" in (out / "overrides.txt").read_text()
    assert (out / "log.txt").exists()


def test_a_second_run_is_refused_replaced_or_continued(run, trained, photos):
    out, _ = trained
    words = ("pretrain", f"data.source={photos}", *TINY, "steps=4", "--out", out, "--quiet")
    refused = run(*words)
    assert refused.exit_code == 2
    assert "already holds a run" in refused.stderr
    assert run(*words, "--resume", "--overwrite").exit_code == 2
    again = run(*words, "--overwrite", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["last"]["step"] == 3


def test_report_of_a_run(run, trained):
    out, _ = trained
    result = run("report", out)
    assert result.exit_code == 0, result.output
    page = (out / "report" / "index.html").read_text()
    assert "learned without labels for 4 of 4 steps" in page
    assert "dino-adapters pretrain" in page
    assert page.count("<svg") == 2


def test_export_of_a_run(run, trained, tmp_path):
    out, _ = trained
    result = run("export", out, "--out", tmp_path / "mine", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert "card.json" in json.loads(result.stdout)["files"]
    again = run("export", out, "--out", tmp_path / "mine")
    assert again.exit_code != 0
    assert "Traceback" not in again.output


def test_export_of_an_unfinished_run_says_how_to_finish_it(run, trained, tmp_path):
    import shutil

    out, _ = trained
    shutil.rmtree(out / "export")
    result = run("export", out, "--out", tmp_path / "mine")
    assert result.exit_code == 8
    assert "--resume" in result.stderr


def test_report_of_nothing(run, tmp_path):
    result = run("report", tmp_path)
    assert result.exit_code == 3
    assert "holds no run" in result.stderr


def test_start_hands_its_words_on(run, monkeypatch, tmp_path):
    import sys
    from types import ModuleType

    from dino_adapters.contracts import Report, Table

    asked = {}

    def start(data, labels, weights, out, **options):
        asked.update(options, data=data, labels=labels, weights=weights, out=out)
        return Report("T", ("It helped.",), (Table("N", ("", "1-shot"), (("a", "1.0"),)),))

    stand_in = ModuleType("dino_adapters.study.start")
    stand_in.start = start  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "dino_adapters.study.start", stand_in)
    result = run("start", "--data", tmp_path, "--labels", "folder", "--minutes", "2",
                 "--seed", "3", "--out", tmp_path / "o", "--overwrite", "-q",
                 "--shots", "10,1", "--bands", "nir,red", "--value-range", "0,4000")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "It helped." in result.stdout
    assert asked == {
        "data": tmp_path,
        "labels": "folder",
        "weights": None,
        "out": tmp_path / "o",
        "minutes": 2.0,
        "seed": 3,
        "overwrite": True,
        "quiet": True,
        "shots": (1, 10),
        "bands": ("nir", "red"),
        "value_range": (0.0, 4000.0),
    }
    assert run("start", "--shots", "few").exit_code == 2

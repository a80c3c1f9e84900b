"""fit, evaluate and report on a small labelled folder."""

import json

import pytest

WORDS = ("data.labels=folder", "backbone=vitmicro8", "size=32", "head=ncm", "shots=[1,2]",
         "draws=3", "device=cpu")  # fmt: skip


@pytest.fixture
def words(photos):
    return (f"data.source={photos}", *WORDS)


def test_the_whole_way(run, words, tmp_path):
    out = tmp_path / "task"
    fitted = run("fit", *words, "--out", out, "--quiet")
    assert fitted.exit_code == 0, fitted.output
    assert "Validation at 32 px:" in fitted.stdout
    assert (out / "head" / "head.json").exists()
    assert json.loads((out / "split.json").read_text())["splits"]["test"]

    judged = run("evaluate", out)
    assert judged.exit_code == 0, judged.output
    assert "0 of 36 images" in judged.stderr or "1 of 37" in judged.stderr, "embedded already"
    for said in ("balanced accuracy", "recall of red", "image statistics", "vitmicro8", "2-shot"):
        assert said in judged.stdout
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["name"] == "balanced_accuracy"
    assert rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]

    shown = run("report", out)
    assert shown.exit_code == 0, shown.output
    page = (out / "report" / "index.html").read_text()
    assert "vitmicro8 with the head &#39;ncm&#39; reaches" in page
    assert "dino-adapters evaluate" in page


def test_evaluate_fits_first_and_speaks_json(run, words, tmp_path):
    out = tmp_path / "task"
    result = run("evaluate", *words, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["metrics"][0]["name"] == "balanced_accuracy"
    assert set(told["few_shot"]["rows"]) == {"raw pixels", "image statistics", "vitmicro8"}
    assert (out / "fit.json").exists()


def test_evaluate_refuses_another_recipe_and_needs_a_folder(run, words, tmp_path):
    out = tmp_path / "task"
    assert run("fit", *words, "--out", out, "-q").exit_code == 0
    other = run("evaluate", *words, "draws=4", "--out", out)
    assert other.exit_code == 2
    assert "another recipe (other: draws)" in other.stderr
    assert "Name one with --out" in run("evaluate", *words).stderr
    assert "judged as it is" in run("evaluate", out, "draws=4").stderr
    again = run("fit", *words, "--out", out)
    assert again.exit_code == 2
    assert "already holds a run" in again.stderr
    assert "--resume" not in again.stderr


def test_no_labels(run, photos, tmp_path):
    result = run("fit", f"data.source={photos}", "--out", tmp_path / "task")
    assert result.exit_code == 3
    assert "has no labels" in result.stderr
    assert not (tmp_path / "task" / "recipe.json").exists()


def test_unknown_heads_and_options(run, words, tmp_path):
    out = ("--out", tmp_path / "task")
    assert "Known: knn, linear, ncm" in run("fit", *words, "head=forest", *out).stderr
    result = run("fit", *words, "head_options.k=3", *out)
    assert result.exit_code == 2
    assert "The head 'ncm' has no option 'k'. It has: centre, temperature." in result.stderr


def test_the_best_of_several_sizes_is_chosen_on_validation(run, words, tmp_path):
    out = tmp_path / "task"
    result = run("fit", *words, "size=[16,32]", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    scores = {int(size): score for size, score in told["validation"].items()}
    assert set(scores) == {16, 32}
    assert scores[told["size"]] == max(scores.values())


def contents(folder):
    """Path -> bytes of every file, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_overwrite_replaces_a_run_only_when_nothing_is_left_to_refuse(run, words, photos, tmp_path):
    out = tmp_path / "task"
    assert run("fit", *words, "--out", out, "-q").exit_code == 0
    before = contents(out)
    del before["log.txt"]
    wrong = (f"data.source={tmp_path / 'phtoos'}", "backbone=vitmicor8", "head=forest", "fit=x")
    for command in ("fit", "evaluate"):
        for word in wrong:
            refused = run(command, *words, word, "--out", out, "--overwrite", "-q")
            assert refused.exit_code in (2, 3, 4), refused.output
            now = contents(out)
            assert {name: now.get(name) for name in before} == before

    replaced = run("fit", *words, "seed=1", "--out", out, "--overwrite", "-q")
    assert replaced.exit_code == 0, replaced.output
    assert json.loads((out / "recipe.json").read_text())["seed"] == 1
    assert (out / "split.json").read_bytes() != before["split.json"], "the old split was kept"
    judged = run("evaluate", *words, "--out", out, "--overwrite", "--json")
    assert judged.exit_code == 0, judged.output
    assert (out / "split.json").read_bytes() == before["split.json"]
    assert (out / "evaluation.json").exists()


def test_overwrite_keeps_what_the_new_run_reads(run, words, tmp_path):
    out = tmp_path / "task"
    assert run("fit", *words, "--out", out, "-q").exit_code == 0
    before = contents(out)
    refused = run("fit", *words, f"split={out / 'split.json'}", "--out", out, "--overwrite")
    assert refused.exit_code == 2
    assert "which --overwrite would remove" in refused.stderr
    assert contents(out).keys() == before.keys()


def test_out_that_is_a_file(run, words, tmp_path):
    (tmp_path / "task").write_text("mine")
    for command, more in (("fit", ()), ("evaluate", ()), ("fit", ("--overwrite",))):
        refused = run(command, *words, "--out", tmp_path / "task", *more)
        assert refused.exit_code == 2, refused.output
        assert "is a file, and a run needs a folder" in refused.stderr

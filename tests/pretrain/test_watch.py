"""Looks while training, and what follows: rollback, stop, early stop, the gate's export."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino_adapters.backbones import build_network, export_backbone, load_backbone
from dino_adapters.contracts import CheckpointError, CollapseError, DataError, RecipeError
from dino_adapters.data.resize import to_square, unit_range
from dino_adapters.pretrain import candidates, pretrain, watch
from dino_adapters.pretrain.diagnosis import Finding
from dino_adapters.pretrain.rows import is_before, is_look
from dino_adapters.runtime.runfolder import RunFolder

CLASSES = ("dark", "light", "stripes")
LOOKS = {"every": 0.5, "images": 6}


@pytest.fixture
def labelled(tmp_path):
    """Ninety small images of three classes, in groups of three, and their table."""
    folder = tmp_path / "labelled"
    folder.mkdir()
    draws = np.random.default_rng(0)
    rows = []
    for index in range(90):
        kind = CLASSES[index % 3]
        pixels = draws.integers(0, 100, (40, 40, 3), dtype=np.uint8)
        pixels += np.uint8(120 if kind == "light" else 0)
        if kind == "stripes":
            pixels[::4] = 250
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        rows.append((f"{index:02d}.png", kind, f"g{index // 3}"))
    with (folder / "labels.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("path", "label", "group"), *rows])
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[k], v) for k, v in theirs.items())


@pytest.fixture
def told(tiny, labelled):
    def make(**changes):
        data = {"source": str(labelled), "labels": str(labelled / "labels.csv")}
        changes.setdefault("monitor", LOOKS)
        return tiny(data=data, **changes)

    return make


def test_looks_are_noted_before_the_first_step_and_after_the_last(told, tmp_path):
    folder = RunFolder(tmp_path / "run")
    pretrain(told(), folder, quiet=True)
    looks = [row for row in folder.rows() if is_look(row)]
    assert [row["step"] for row in looks] == [0, 3, 6]
    for row in looks:
        assert {"watch/rankme", "watch/cls_cosine", "watch/knn", "watch/linear"} <= set(row)
        assert 0 <= row["watch/knn"] <= 1
    interval = {"watch/gain_low", "watch/gain_high"}  # not with answers that hardly differ
    assert looks[0].keys() | {"watch/gain"} == looks[2].keys() - interval
    assert len(folder.rows_with("loss")) == 6


@pytest.fixture
def resumed(tmp_path, interrupted):
    """Folders of a run that went through, and of one that was ended in front of step 4."""

    def run(recipe):
        whole, folder = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
        pretrain(recipe, whole, quiet=True)
        interrupted(recipe, folder, step=4)
        pretrain(recipe, folder, resume=True, quiet=True)
        return whole, folder

    return run


def test_looking_changes_nothing(told, tmp_path):
    seen = pretrain(told(), RunFolder(tmp_path / "a"), quiet=True)
    blind = pretrain(told(monitor={"every": 0.0}), RunFolder(tmp_path / "b"), quiet=True)
    assert equal(weights(seen), weights(blind))


def test_a_resumed_run_keeps_and_repeats_its_looks(told, resumed):
    whole, folder = resumed(told(gate={}, checkpoint={"every_steps": 3}))

    def plain(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert plain(folder.rows()) == plain(whole.rows())
    assert json.loads((folder.path / "gate.json").read_text()) == json.loads(
        (whole.path / "gate.json").read_text()
    )
    assert equal(weights(folder.export), weights(whole.export))


@pytest.mark.parametrize("kind", ["better", "worse", "same"])
def test_the_gate_exports_what_the_verdict_says(told, tmp_path, monkeypatch, kind, caplog):
    judge = candidates.judge

    def settled(*given):
        return replace(judge(*given), kind=kind)

    monkeypatch.setattr(candidates, "judge", settled)
    folder = RunFolder(tmp_path / "run")
    with caplog.at_level("INFO"):
        pretrain(told(gate={}, optim={"lr": 0.1}), folder, quiet=True)
    start, continued = (weights(folder.path / "candidates" / n) for n in ("start", "continued"))
    assert not equal(start, continued)
    assert equal(weights(folder.export), continued if kind == "better" else start)
    found = json.loads((folder.path / "gate.json").read_text())
    assert found["exported"] == ("continued" if kind == "better" else "start")
    assert found["sentence"] in caplog.text


def test_a_gain_on_a_fallen_gallery_exports_the_start(told, tmp_path, monkeypatch):
    judge, change = candidates.judge, candidates.change_of_selection
    interval = {"difference": 0.2, "low": 0.1, "high": 0.3}

    def gained(*given):
        return replace(judge(*given), kind="better", **interval)

    def fell(*given):
        return replace(change(*given), difference=-0.1, low=-0.2, high=-0.05)

    monkeypatch.setattr(candidates, "judge", gained)
    monkeypatch.setattr(candidates, "change_of_selection", fell)
    folder = RunFolder(tmp_path / "run")
    pretrain(told(gate={}), folder, quiet=True)
    found = json.loads((folder.path / "gate.json").read_text())
    assert (found["kind"], found["exported"]) == ("same", "start")
    assert found["chosen_by"] == [-0.1, -0.2, -0.05]
    assert "but -10.0 points" in found["sentence"]
    assert equal(weights(folder.export), weights(folder.path / "candidates" / "start"))


def test_without_labels_the_start_is_handed_back_unless_told_otherwise(tiny, tmp_path):
    recipe = tiny(gate={}, monitor=LOOKS)
    folder = RunFolder(tmp_path / "a")
    pretrain(recipe, folder, quiet=True)
    assert equal(weights(folder.export), weights(folder.path / "candidates" / "start"))
    found = json.loads((folder.path / "gate.json").read_text())
    assert found["kind"] == "unknown"
    assert "Open: nothing is labelled" in found["sentence"]
    other = RunFolder(tmp_path / "b")
    pretrain(recipe.changed({"gate": {"unshown": "continued"}}), other, quiet=True)
    assert equal(weights(other.export), weights(other.path / "candidates" / "continued"))
    assert not equal(weights(other.export), weights(folder.export))


def alarmed(monkeypatch, at):
    """Finds a collapse in the looks after these steps."""
    findings = watch.Watch.findings
    seen = []

    def found(self):
        seen.append(self.run.progress.step)
        if (self.run.progress.step, self.run.progress.rollbacks) in at:
            return (Finding("collapse", "All class tokens are alike."),)
        return findings(self)

    monkeypatch.setattr(watch.Watch, "findings", found)
    return seen


def test_a_collapse_stops_the_run_with_its_sentence(told, tmp_path, monkeypatch):
    alarmed(monkeypatch, {(3, 0)})
    folder = RunFolder(tmp_path / "run")
    monitor = LOOKS | {"on_collapse": "stop"}
    with pytest.raises(CollapseError, match="All class tokens are alike"):
        pretrain(told(monitor=monitor), folder, quiet=True)
    assert len(folder.rows_with("loss")) == 3


def test_a_collapse_takes_the_run_back_at_half_the_rate(told, tmp_path, monkeypatch, caplog):
    monitor = {"every": 0.34, "images": 6, "on_collapse": "rollback", "rollbacks": 1}
    recipe = told(monitor=monitor, steps=6, checkpoint={"every_steps": 1})
    plain = RunFolder(tmp_path / "plain")
    pretrain(recipe, plain, quiet=True)
    seen = alarmed(monkeypatch, {(4, 0)})
    folder = RunFolder(tmp_path / "run")
    pretrain(recipe, folder, quiet=True)
    assert seen == [0, 2, 4, 4, 6]
    assert "goes back to step 2" in caplog.text
    rows, before = folder.rows_with("loss"), plain.rows_with("loss")
    assert [row["step"] for row in rows] == list(range(6))
    for ours, theirs in zip(rows, before, strict=True):
        factor = 1.0 if ours["step"] < 2 else 0.5
        assert ours["lr"] == pytest.approx(factor * theirs["lr"])
    assert [row["step"] for row in folder.rows() if is_look(row)] == [0, 2, 4, 6]


def test_after_the_last_rollback_the_run_stops(told, tmp_path, monkeypatch):
    alarmed(monkeypatch, {(4, 0), (4, 1)})
    monitor = {"every": 0.34, "images": 6, "on_collapse": "rollback", "rollbacks": 1}
    with pytest.raises(CollapseError):
        pretrain(told(monitor=monitor), RunFolder(tmp_path / "run"), quiet=True)


def test_early_stop_delivers_the_best_look_and_stays_ended(told, tmp_path, monkeypatch):
    real, scores = candidates.look, iter([0.5, 0.9, 0.4, 0.3, 0.99, 0.99])

    def scored(*given, **more):
        return replace(real(*given, **more), selection=next(scores))

    monkeypatch.setattr(candidates, "look", scored)
    folder = RunFolder(tmp_path / "run")
    recipe = told(monitor={"every": 1 / 6, "images": 6, "patience": 2})
    export = pretrain(recipe, folder, quiet=True)
    assert len(folder.rows_with("loss")) == 3  # best after step 1, two looks without a new best
    assert load_backbone(export).info.training["steps"] == 1
    pretrain(recipe, folder, resume=True, quiet=True)
    assert len(folder.rows_with("loss")) == 3


def scores_of(monkeypatch, scores):
    """Looks with these scores to choose by, in order; the verdict's are left as they are."""
    real, given = candidates.look, iter(scores)

    def scored(*told, **more):
        found = real(*told, **more)
        score = next(given, found.selection)
        right = np.arange(len(found.asked)) * 0.618 % 1 < score  # about as many of each class
        return replace(found, selection=score, held_out=np.stack([right, right]))

    monkeypatch.setattr(candidates, "look", scored)


def test_a_fall_takes_the_run_back_to_the_good_state_and_not_to_itself(told, tmp_path, monkeypatch):
    scores_of(monkeypatch, [0.8, 0.9, 0.5, 0.9, 0.9])
    monitor = {"every": 0.34, "images": 6, "on_collapse": "rollback", "rollbacks": 1}
    folder = RunFolder(tmp_path / "run")
    pretrain(told(monitor=monitor), folder, quiet=True)
    (kept,) = (folder.path / "best_state").glob("step_*")
    assert kept.name == "step_00000002"
    rates = [row["lr"] for row in folder.rows_with("loss")]
    assert len(rates) == 6


def test_a_fall_in_the_first_look_goes_back_to_the_start(told, tmp_path, monkeypatch, caplog):
    scores_of(monkeypatch, [0.8, 0.2, 0.8, 0.8, 0.8])
    monitor = {"every": 0.34, "images": 6, "on_collapse": "rollback", "rollbacks": 1}
    pretrain(told(monitor=monitor), RunFolder(tmp_path / "run"), quiet=True)
    assert "goes back to step 0" in caplog.text


def test_without_labels_a_collapse_goes_back_to_the_look_before(
    tiny, tmp_path, monkeypatch, caplog
):
    alarmed(monkeypatch, {(4, 0)})
    monitor = {"every": 0.34, "images": 6, "on_collapse": "rollback", "rollbacks": 1}
    pretrain(tiny(monitor=monitor), RunFolder(tmp_path / "run"), quiet=True)
    assert "goes back to step 2" in caplog.text


def test_the_verdicts_images_decide_nothing_on_the_way(told, tmp_path, monkeypatch):
    """Queries that fall while the gallery rises are logged, and the run goes on."""
    scores_of(monkeypatch, [0.6, 0.7, 0.8])
    judge = candidates.judge

    def fallen(*given):
        return replace(judge(*given), difference=-0.3, low=-0.4, high=-0.2, kind="worse")

    monkeypatch.setattr(candidates, "judge", fallen)
    monitor = LOOKS | {"on_collapse": "rollback"}
    folder = RunFolder(tmp_path / "run")
    pretrain(told(monitor=monitor, gate={}), folder, quiet=True)
    assert [row["step"] for row in folder.rows_with("loss")] == list(range(6))
    assert json.loads((folder.path / "gate.json").read_text())["exported"] == "start"


def test_the_start_comes_back_as_it_was_given(told, tmp_path):
    first = pretrain(told(monitor={"every": 0.0}, steps=1), RunFolder(tmp_path / "a"), quiet=True)
    network, info = build_network(first)
    given = export_backbone(network, replace(info, size=96), tmp_path / "given")
    recipe = told(gate={}).changed({"model": {"source": str(given), "architecture": {}}})
    folder = RunFolder(tmp_path / "run")
    pretrain(recipe, folder, quiet=True)
    back = load_backbone(folder.path / "candidates" / "start").info
    assert back.size == 96
    assert back.training == load_backbone(given).info.training
    continued = load_backbone(folder.path / "candidates" / "continued").info
    assert continued.size in candidates_sizes(folder)


def candidates_sizes(folder):
    return {
        int(size)
        for size in json.loads((folder.path / "candidates/start.json").read_text())["scores"]
    }


def test_killed_before_the_first_state_it_begins_again(told, resumed):
    whole, folder = resumed(told(gate={}, checkpoint={"every_steps": 100}))
    steps = [(row["step"], is_look(row)) for row in folder.rows()]
    assert steps == [(row["step"], is_look(row)) for row in whole.rows()]
    ours, theirs = (weights(f.path / "candidates" / "continued") for f in (folder, whole))
    assert equal(ours, theirs)


def test_looks_at_a_frozen_backbone_are_no_candidates(told, tmp_path):
    schedule = {"freeze_backbone": 0.3, "warmup": 0.0}
    monitor = {"every": 0.1, "images": 6, "patience": 2}
    folder = RunFolder(tmp_path / "run")
    export = pretrain(told(schedule=schedule, monitor=monitor, steps=10), folder, quiet=True)
    assert load_backbone(export).info.training["steps"] > 3
    assert len(folder.rows_with("loss")) > 3


def test_patience_without_looks_delivers_the_last(told, tmp_path):
    recipe = told(monitor={"every": 0.0, "patience": 2})
    assert pretrain(recipe, RunFolder(tmp_path / "run"), quiet=True).is_dir()


def test_labels_may_come_later(tiny, labelled, tmp_path, monkeypatch):
    """As the verdict without labels advises: name some, and go on."""
    data = {"source": str(labelled)}
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(data=data, gate={}, monitor=LOOKS), folder, quiet=True)
    assert json.loads((folder.path / "gate.json").read_text())["kind"] == "unknown"
    named = tiny(data=data, gate={}, monitor=LOOKS | {"labels": str(labelled / "labels.csv")})
    pretrain(named, folder, resume=True, accept_changes=True, quiet=True)
    assert json.loads((folder.path / "gate.json").read_text())["kind"] != "unknown"


def test_what_chose_never_judges_when_labels_are_added(
    told, labelled, tmp_path, monkeypatch, caplog
):
    """All labels are dealt anew, and images of the old gallery would become queries."""
    lines = (labelled / "labels.csv").read_text().splitlines()
    few = labelled / "few.csv"
    few.write_text("\n".join(lines[:46]) + "\n")
    real, sets = candidates.look, []

    def spied(network, info, images, sizes, **more):
        sets.append(images)
        return real(network, info, images, sizes, **more)

    monkeypatch.setattr(candidates, "look", spied)
    folder = RunFolder(tmp_path / "run")
    some = LOOKS | {"labels": str(few)}
    pretrain(told(gate={}, monitor=some), folder, quiet=True)
    before = {sets[-1].groups[key] for key in sets[-1].gallery}
    pretrain(told(gate={}), folder, resume=True, accept_changes=True, quiet=True)
    after = {sets[-1].groups[key] for key in sets[-1].queries}
    assert len(sets[-1].gallery) > len(sets[0].gallery)
    assert after
    assert not before & after
    assert "not judged on, as the run chose by them" in caplog.text
    marks = (folder.path / "candidates" / "learned.json").read_text()
    assert "group/" not in marks  # digests, no names
    seen = len(sets)
    pretrain(told(gate={}), folder, resume=True, quiet=True)  # and stays so
    assert {sets[seen].groups[key] for key in sets[seen].queries} == after


def test_a_gate_that_comes_later_is_refused(told, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    pretrain(told(steps=2), folder, quiet=True)
    with pytest.raises(CheckpointError, match="began without a gate"):
        pretrain(told(steps=4, gate={}), folder, resume=True, accept_changes=True, quiet=True)


def test_a_finished_run_may_be_told_more_steps(told, tmp_path):
    folder = RunFolder(tmp_path / "run")
    pretrain(told(steps=2), folder, quiet=True)
    pretrain(told(steps=4), folder, resume=True, accept_changes=True, quiet=True)
    assert len(folder.rows_with("loss")) == 4


def test_a_wrong_table_is_refused_before_the_old_run_goes(told, tmp_path):
    folder = RunFolder(tmp_path / "run")
    export = pretrain(told(steps=2), folder, quiet=True)
    wrong = told(steps=2, monitor=LOOKS | {"labels": "typo.csv"})
    with pytest.raises(DataError, match=r"typo\.csv"):
        pretrain(wrong, folder, overwrite=True, quiet=True)
    assert export.is_dir()


def test_a_gate_and_the_last_state_of_a_phase_do_not_go_together(tiny, tmp_path):
    recipe = tiny(gate={}, phases=[{"name": "a"}, {"name": "b", "start": "state"}])
    with pytest.raises(RecipeError, match=r"Phase b: .*Set start='teacher'"):
        pretrain(recipe, RunFolder(tmp_path / "run"), quiet=True)


def test_the_middle_of_an_image_is_looked_at():
    image = torch.zeros(3, 40, 60)
    image[:, :, 6:54] = 1.0  # a little more than the square, as the filter reaches beyond it
    assert float(to_square(unit_range(image), 24).min()) == pytest.approx(1.0)
    assert to_square(unit_range((image * 255).byte()), 16).shape == (3, 16, 16)


def test_rows_after_a_state_are_written_again():
    steps, looks = {"step": 3, "loss": 1.0}, {"step": 3, "watch/knn": 0.5}
    assert is_before(looks, 3)
    assert not is_before(steps, 3)
    assert is_before(steps, 4)
    assert not is_before(looks, 2)

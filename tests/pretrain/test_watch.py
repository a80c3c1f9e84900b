"""Looks while training, and what follows: rollback, stop, early stop, the gate's export."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino_adapters.backbones import load_backbone
from dino_adapters.contracts import CollapseError
from dino_adapters.pretrain import loop, pretrain, watch
from dino_adapters.pretrain.diagnosis import Finding
from dino_adapters.pretrain.watch import is_before, is_look, square
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
    assert looks[0].keys() | {"watch/gain", "watch/gain_low", "watch/gain_high"} == looks[2].keys()
    assert len(folder.rows_with("loss")) == 6


def test_looking_changes_nothing(told, tmp_path):
    seen = pretrain(told(), RunFolder(tmp_path / "a"), quiet=True)
    blind = pretrain(told(monitor={"every": 0.0}), RunFolder(tmp_path / "b"), quiet=True)
    assert equal(weights(seen), weights(blind))


def test_a_resumed_run_keeps_and_repeats_its_looks(told, tmp_path, monkeypatch):
    recipe = told(gate={}, checkpoint={"every_steps": 3})
    whole, folder = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    pretrain(recipe, whole, quiet=True)
    step = loop.one_step

    def killed(run, crops, knobs):
        if knobs.step == 4:
            raise KeyboardInterrupt
        return step(run, crops, knobs)

    monkeypatch.setattr(loop, "one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder, quiet=True)
    monkeypatch.undo()
    pretrain(recipe, folder, resume=True, quiet=True)

    def plain(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert plain(folder.rows()) == plain(whole.rows())
    assert json.loads((folder.path / "gate.json").read_text()) == json.loads(
        (whole.path / "gate.json").read_text()
    )
    assert equal(weights(folder.export), weights(whole.export))


@pytest.mark.parametrize("kind", ["better", "worse", "same"])
def test_the_gate_exports_what_the_verdict_says(told, tmp_path, monkeypatch, kind, caplog):
    judge = watch.judge

    def settled(*given):
        return replace(judge(*given), kind=kind)

    monkeypatch.setattr(watch, "judge", settled)
    folder = RunFolder(tmp_path / "run")
    with caplog.at_level("INFO"):
        pretrain(told(gate={}, optim={"lr": 0.1}), folder, quiet=True)
    start, continued = (weights(folder.path / "candidates" / n) for n in ("start", "continued"))
    assert not equal(start, continued)
    assert equal(weights(folder.export), continued if kind == "better" else start)
    found = json.loads((folder.path / "gate.json").read_text())
    assert found["exported"] == ("continued" if kind == "better" else "start")
    assert found["sentence"] in caplog.text


def test_without_labels_the_start_is_handed_back_unless_told_otherwise(tiny, tmp_path):
    recipe = tiny(gate={}, monitor=LOOKS)
    folder = RunFolder(tmp_path / "a")
    pretrain(recipe, folder, quiet=True)
    assert equal(weights(folder.export), weights(folder.path / "candidates" / "start"))
    found = json.loads((folder.path / "gate.json").read_text())
    assert found["kind"] == "unknown"
    assert "Nothing is labelled" in found["sentence"]
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
    real, scores = watch.look, iter([0.5, 0.9, 0.4, 0.3, 0.99, 0.99])

    def scored(*given):
        return replace(real(*given), selection=next(scores))

    monkeypatch.setattr(watch, "look", scored)
    folder = RunFolder(tmp_path / "run")
    recipe = told(monitor={"every": 1 / 6, "images": 6, "patience": 2})
    export = pretrain(recipe, folder, quiet=True)
    assert len(folder.rows_with("loss")) == 3  # best after step 1, two looks without a new best
    assert load_backbone(export).info.training["steps"] == 1
    pretrain(recipe, folder, resume=True, quiet=True)
    assert len(folder.rows_with("loss")) == 3


def test_the_middle_of_an_image_is_looked_at():
    image = torch.zeros(3, 40, 60)
    image[:, :, 10:50] = 1.0
    assert float(square(image, 24).min()) == pytest.approx(1.0)
    assert square((image * 255).byte(), 16).shape == (3, 16, 16)


def test_rows_after_a_state_are_written_again():
    steps, looks = {"step": 3, "loss": 1.0}, {"step": 3, "watch/knn": 0.5}
    assert is_before(looks, 3)
    assert not is_before(steps, 3)
    assert is_before(steps, 4)
    assert not is_before(looks, 2)

"""The scripts of benchmarks/ run through, keep what is finished and refuse other settings."""

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_adapters.backbones import build_network, export_backbone
from dino_adapters.contracts import RunFolderError

FOLDER = Path(__file__).parents[2] / "benchmarks"
CLASSES = ("ring", "disc")
EACH = 6
SIDE = 48


@pytest.fixture
def script(monkeypatch):
    """Runs a script as the command line does, in this process."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")

    yield run
    torch.set_num_threads(threads)
    for name in ("grid", "methods"):
        sys.modules.pop(name, None)


@pytest.fixture
def images(tmp_path):
    """Two classes of six images with masks, a table and a split."""
    root = tmp_path / "images"
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    distance = np.hypot(y, x)
    rows, parts = [], {"train": [], "val": [], "test": []}
    for at in range(EACH * len(CLASSES)):
        label, number = CLASSES[at // EACH], at % EACH
        part = "train" if number < 3 else "val" if number == 3 else "test"
        inside = distance < 10 + number
        mask = inside & (distance > 5) if label == "ring" else inside
        noise = np.random.default_rng(at).integers(0, 60, (SIDE, SIDE, 3))
        path = f"{label}/{number}.png"
        (root / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray((noise + 150 * mask[..., None]).astype(np.uint8)).save(root / path)
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"masks/{at}.png")
        parts[part].append(path)
        rows.append((f"images/{path}", f"masks/{at}.png", label, part))
    (tmp_path / "split.json").write_text(json.dumps({"splits": parts}))
    with (tmp_path / "table.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("image", "mask", "label", "split"), *rows])
    return tmp_path


def result(folder):
    return json.loads((folder / "rows.json").read_text())


@pytest.mark.slow
def test_methods(images, script, capsys):
    words = ["--data", images / "images", "--labels", "folder", "--split", images / "split.json"]
    words += ["--out", images / "out", "--sizes", 32, 48, "--batch", 4, "--seeds", 1]
    script("methods", *words, "--steps", 2, "--variants", "dino_v1", "dinov2", "dinov3")
    rows = result(images / "out")
    names = ["dino_v1", "dinov2", "dinov3", "untrained", "image statistics"]
    assert [row["variant"] for row in rows] == names
    assert all(0.0 <= row[metric] <= 1.0 for row in rows for metric in ("knn", "few"))
    assert "less dinov3" in capsys.readouterr().out
    script("methods", *words, "--steps", 2, "--variants", "dinov3", "dinov3_sigreg")
    assert capsys.readouterr().out.count("done:") == 1  # only what was not there
    with pytest.raises(RunFolderError, match="other settings"):
        script("methods", *words, "--steps", 3)


@pytest.mark.slow
def test_methods_in_two_processes(images, script):
    words = ["--data", images / "images", "--labels", "folder", "--split", images / "split.json"]
    words += ["--sizes", 32, "--batch", 4, "--steps", 3, "--seeds", 1, "--variants", "dinov3"]
    for jobs in (1, 2):
        script("methods", *words, "--out", images / f"out{jobs}", "--jobs", jobs)
    one, two = (
        [(row["variant"], row["knn"], row["few"]) for row in result(images / f"out{jobs}")]
        for jobs in (1, 2)
    )
    assert one == two


@pytest.mark.slow
def test_phases(images, script, capsys):
    words = ["--table", images / "table.csv", "--out", images / "out", "--batch", 4]
    words += ["--steps", 2, "--size", 48, "--bank", 4, "--rarest", 2, "--seeds", 2]
    script("phases", *words)
    rows = result(images / "out")
    assert len(rows) == 2 * 10
    first = {row["chain"]: row for row in rows if row["phase"] == "pretrain" and row["seed"] == 0}
    assert {**first["gram"], "chain": ""} == {**first["plain"], "chain": ""}
    refined = {row["chain"]: row for row in rows if row["phase"] == "refine" and row["seed"] == 0}
    assert refined["gram"]["local"] != refined["plain"]["local"]
    assert all(0.0 <= row["iou"] <= 1.0 for row in rows)
    assert "gram less plain" in capsys.readouterr().out
    runs = images / "out" / "runs"
    gram = json.loads((runs / "gram_0/phases/2_refine/recipe.json").read_text())["gram"]
    plain = json.loads((runs / "plain_0/phases/2_refine/recipe.json").read_text())["gram"]
    assert gram["teacher"] == "pretrain@1"
    assert plain is None


@pytest.mark.slow
def test_small_batch(images, script, capsys):
    words = ["--data", images / "images", "--labels", "folder", "--split", images / "split.json"]
    words += ["--out", images / "out", "--sizes", 32, "--seeds", 1, "--steps", 2]
    script("small_batch", *words, "--batches", 2, 4, "--prototypes", "auto", 512)
    *trained, untrained = result(images / "out")
    assert [row["batch"] for row in trained] == [2, 2, 4, 4]
    assert [row["k"] for row in trained if row["prototypes"] != "auto"] == [512, 512]
    # Twelve images cannot fill many prototypes: the entropy of a choice is at most log 12.
    assert all(row["k"] < 512 for row in trained if row["prototypes"] == "auto")
    assert all(1 <= row["effective"] <= row["k"] for row in trained)
    assert "below" not in untrained
    assert "exp(entropy)" in capsys.readouterr().out


@pytest.mark.slow
def test_gate(images, script, capsys):
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    start = export_backbone(*build_network("vitmicro8", architecture=small), images / "start")
    words = ["--data", images / "images", "--labels", "folder", "--split", images / "split.json"]
    words += ["--start", start, "--out", images / "out", "--seeds", 1, "--batch", 4]
    words += ["--set", "steps=2", "crops.global_size=32", "crops.local_size=16"]
    script("gate", *words)
    rows = result(images / "out")
    assert [row["variant"] for row in rows] == ["naive", "ours", "lora", "scratch"]
    # The start is one network, read once for each: the same figures in every row.
    assert len({(row["start_knn"], row["start_linear"], row["start_size"]) for row in rows}) == 1
    for row in rows:
        assert row["low"] is None or row["low"] <= row["gain"] <= row["high"]
        kept = row["exported"] == "start"
        assert row["exported_gain"] == (0.0 if kept else row["gain"])
        assert all(0.0 <= row[f"shot_{shot}"] <= 1.0 for shot in (1, 5, 10))
    assert len({tuple(row[f"start_shot_{shot}"] for shot in (1, 5, 10)) for row in rows}) == 1
    recipes = {
        name: json.loads((images / f"out/runs/{name}_0/recipe.json").read_text())
        for name in ("naive", "ours", "lora", "scratch")
    }
    assert recipes["naive"]["anchor"] is None
    assert recipes["ours"]["anchor"]["cls_weight"] > 0
    assert recipes["lora"]["lora"] is not None
    assert recipes["scratch"]["model"]["architecture"]["embed_dim"] == 16
    told = capsys.readouterr().out
    assert "gate said" in told
    assert "5-shot" in told

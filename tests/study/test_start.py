"""The whole job on a folder of small images: rows, verdict, page, resuming, refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from dino_adapters.contracts import DataError, RunFolderError
from dino_adapters.pretrain import pretrain
from dino_adapters.study import start as start_room
from dino_adapters.study.plans import continue_sizes
from dino_adapters.study.reading import at_most, candidate_sizes
from dino_adapters.study.start import start

NETWORK = "resnet10t"


def draw(folder, classes=("dots", "lines", "plain"), count=9):
    draws = np.random.default_rng(0)
    for kind in classes:
        (folder / kind).mkdir(parents=True)
        for index in range(count):
            pixels = draws.integers(90, 160, (64, 72, 3)).astype(np.uint8)
            if kind == "lines":
                pixels[::6] = 255
            if kind == "dots":
                pixels[::6, ::6] = 255
            Image.fromarray(pixels).save(folder / kind / f"{index}.png")
    return folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(start_room, "SCRATCH_STEPS", 5)
    monkeypatch.setattr(start_room, "CONTINUE_STEPS", 5)
    monkeypatch.setattr(start_room, "DRAWS", 3)


def test_a_folder_in_a_verdict_and_a_page_out(tmp_path, quick):
    out = tmp_path / "out"
    report = start(draw(tmp_path / "images"), None, NETWORK, out, quiet=True)
    rows = [row[0] for row in report.tables[0].rows]
    assert rows == [
        "raw pixels",
        "image statistics",
        "micro ViT, untrained",
        "micro ViT, from nothing",
        "resnet10t, frozen",
        "resnet10t, continued",
    ]
    assert "resnet10t, continued" in " ".join(report.summary)
    page = (out / "report" / "index.html").read_text()
    for word in ("<svg", "raw pixels", "--weights resnet10t"):
        assert word in page
    assert "<script" not in page
    recipe = json.loads((out / "scratch" / "recipe.json").read_text())
    assert recipe["split"] == str(out / "split.json")
    train = json.loads((out / "split.json").read_text())["splits"]["train"]
    card = json.loads((out / "scratch" / "export" / "card.json").read_text())
    assert card["info"]["training"]["images"] == len(train) < 27
    with pytest.raises(RunFolderError, match="already holds a run"):
        start(tmp_path / "images", None, NETWORK, out, quiet=True)
    again = start(tmp_path / "images", None, NETWORK, out, quiet=True, overwrite=True)
    assert again.tables[0].rows == report.tables[0].rows


def test_an_interrupted_job_goes_on_and_ends_the_same(tmp_path, quick, monkeypatch):
    images = draw(tmp_path / "images")
    whole = start(images, None, NETWORK, tmp_path / "a", quiet=True)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(start_room, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        start(images, None, NETWORK, tmp_path / "b", quiet=True)
    monkeypatch.undo()
    for name, value in (("SCRATCH_STEPS", 5), ("CONTINUE_STEPS", 5), ("DRAWS", 3)):
        monkeypatch.setattr(start_room, name, value)
    monkeypatch.setattr(start_room, "pretrain", None)  # both runs are finished: none may start
    again = start(images, None, NETWORK, tmp_path / "b", quiet=True)
    assert again.tables[0].rows == whole.tables[0].rows
    with pytest.raises(RunFolderError, match="other settings"):
        start(images, None, NETWORK, tmp_path / "b", seed=3, quiet=True)


def test_without_labels_it_says_what_cannot_be_said(tmp_path, quick, caplog):
    images = draw(tmp_path / "images", classes=("all",), count=6)
    report = start(images / "all", None, NETWORK, tmp_path / "out", quiet=True)
    assert not report.tables
    assert "Without labels nothing can be said" in report.summary[0]
    assert "--labels" in caplog.text


def test_missing_and_empty_folders(tmp_path, quick):
    with pytest.raises(DataError, match="no folder"):
        start(tmp_path / "nowhere", None, NETWORK, tmp_path / "a", quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        start(tmp_path / "empty", None, NETWORK, tmp_path / "b", quiet=True)


def test_minutes_decide_the_steps_once(tmp_path, quick, monkeypatch):
    seen = []

    def recorded(plan, run, **options):
        seen.append((run.path.name, plan.steps))
        return pretrain(plan, run, **options)

    monkeypatch.setattr(start_room, "pretrain", recorded)
    start(draw(tmp_path / "images"), None, NETWORK, tmp_path / "out", minutes=0.02, quiet=True)
    names = [name for name, _ in seen]
    assert names == [".scratch.probe", "scratch", ".continued.probe", "continued"]
    assert not list((tmp_path / "out").glob(".*.probe"))


@pytest.mark.parametrize(("patch", "side"), [(8, 40), (16, 80), (32, 80), (32, 256), (14, 500)])
def test_sizes_are_multiples_and_never_far_above_the_image(patch, side):
    global_size, local_size = continue_sizes(patch, side)
    assert global_size % patch == local_size % patch == 0
    assert local_size < global_size
    sizes = candidate_sizes(patch, global_size, side)
    assert sizes == tuple(sorted(set(sizes)))
    assert all(size % patch == 0 for size in sizes)
    assert max(sizes) <= max(2 * side, patch)


def test_at_most_keeps_whole_parts_and_forty_of_a_class():
    from dino_adapters.data.splits import Split

    train = tuple(f"{c}{i:03d}" for c in "ab" for i in range(90 if c == "a" else 12))
    split = Split(train, ("v",), ("t",), 0, "made up")
    labels = {key: key[0] for key in train}
    small = at_most(split, labels, 0)
    assert sum(key.startswith("a") for key in small.train) == 40
    assert sum(key.startswith("b") for key in small.train) == 12
    assert (small.val, small.test) == (split.val, split.test)
    assert at_most(split, labels, 0).train == small.train
    assert "at most 40" in small.rule

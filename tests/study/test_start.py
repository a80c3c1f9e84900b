"""The whole job on a folder of small images: rows, verdict, page, resuming, refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from dino_adapters.contracts import DataError, RunFolderError
from dino_adapters.pretrain import pretrain
from dino_adapters.study import start as start_room
from dino_adapters.study import trained
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
    monkeypatch.setattr(trained, "SCRATCH_STEPS", 5)
    monkeypatch.setattr(trained, "CONTINUE_STEPS", 5)
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
    monkeypatch.setattr(start_room, "DRAWS", 3)
    monkeypatch.setattr(trained, "SCRATCH_STEPS", 5)
    monkeypatch.setattr(trained, "CONTINUE_STEPS", 5)
    monkeypatch.setattr(trained, "pretrain", None)  # both runs are finished: none may start
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

    monkeypatch.setattr(trained, "pretrain", recorded)
    start(draw(tmp_path / "images"), None, NETWORK, tmp_path / "out", minutes=0.02, quiet=True)
    names = [name for name, _ in seen]
    assert names == [".scratch.probe", "scratch", ".continued.probe", "continued"]
    assert not list((tmp_path / "out").glob(".*.probe"))


@pytest.mark.parametrize(("patch", "side"), [(8, 40), (16, 80), (32, 80), (32, 256), (14, 500)])
def test_sizes_are_multiples_and_never_far_above_the_image(patch, side):
    global_size, local_size = continue_sizes(patch, side)
    assert global_size % patch == local_size % patch == 0
    assert local_size < global_size
    sizes = candidate_sizes(patch, (2 * patch, global_size), side)
    assert {2 * patch, global_size} <= set(sizes)
    assert sizes == tuple(sorted(set(sizes)))
    assert all(size % patch == 0 for size in sizes)
    assert max(sizes) <= max(2 * side, global_size, 256 + patch)


def test_at_most_keeps_whole_parts_and_some_of_a_class():
    from dino_adapters.data.splits import Split

    train = tuple(f"{c}{i:03d}" for c in "ab" for i in range(90 if c == "a" else 12))
    split = Split(train, ("v",), ("t",), 0, "made up")
    labels = {key: key[0] for key in train}
    small = at_most(split, labels, 0)
    assert sum(key.startswith("a") for key in small.train) == 24
    assert sum(key.startswith("b") for key in small.train) == 12
    assert (small.val, small.test) == (split.val, split.test)
    assert at_most(split, labels, 0).train == small.train
    assert "at most 24" in small.rule


def test_damaged_files_are_left_out_of_every_row_and_named(tmp_path, quick):
    images = draw(tmp_path / "images", count=14)
    for name in ("dots/0.png", "lines/5.png"):
        whole = (images / name).read_bytes()
        (images / name).write_bytes(whole[: len(whole) // 2])
    report = start(images, None, NETWORK, tmp_path / "out", quiet=True)
    assert len(report.tables[0].rows) == 6
    notes = " ".join(report.notes)
    assert "dots/0.png" in notes
    assert "lines/5.png" in notes


def test_unlabelled_images_of_a_held_out_group_do_not_train(tmp_path, quick):
    from dino_adapters.runtime.console import Notices
    from dino_adapters.study.setting import gather

    images = draw(tmp_path / "images", count=16)
    lines = ["path,label,group"]
    for path in sorted(images.rglob("*.png")):
        kind, index = path.parent.name, int(path.stem)
        label = kind if index % 2 else ""
        lines.append(f"{kind}/{path.name},{label},{kind}{index // 4}")
    (images / "labels.csv").write_text("\n".join(lines) + "\n")
    notices = Notices()
    setting = gather(
        images, images / "labels.csv", tmp_path / "split.json",
        bands=None, value_range=None, seed=0, notices=notices,
    )  # fmt: skip
    assert setting.split is not None
    groups = setting.source.groups
    held_out = {groups[key] for key in (*setting.split.val, *setting.split.test)}
    assert held_out
    assert not held_out & {groups[key] for key in setting.split.train}
    assert any(key not in setting.source.labels for key in setting.split.train)
    assert "held out" in " ".join(notices.summary())


def test_one_class_is_refused_before_any_work(tmp_path, quick):
    images = draw(tmp_path / "images", classes=("only",))
    (images / "labels.csv").write_text(
        "path,label\n" + "".join(f"only/{i}.png,only\n" for i in range(9))
    )
    with pytest.raises(DataError, match="of one class, 'only'"):
        start(images, images / "labels.csv", NETWORK, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_overwrite_keeps_the_old_run_until_the_new_one_was_accepted(tmp_path, quick):
    images = draw(tmp_path / "images")
    out = tmp_path / "out"
    start(images, None, NETWORK, out, quiet=True)
    page = (out / "report" / "index.html").read_text()
    with pytest.raises(DataError):
        start(tmp_path / "typo", None, NETWORK, out, quiet=True, overwrite=True)
    assert (out / "report" / "index.html").read_text() == page

"""Steps that are not finite, full disks, damaged states, SIGTERM: nothing is lost, all is said."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino_adapters.contracts import (
    CheckpointError,
    DiskFullError,
    NotFiniteError,
    Preempted,
)
from dino_adapters.pretrain import checkpoint, loop, pretrain
from dino_adapters.pretrain.feed import Feed
from dino_adapters.pretrain.replay import replay
from dino_adapters.pretrain.watch import Watch
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.stopping import stoppable


def weights(export):
    return load_file(export / "model.safetensors")


def poison(monkeypatch, steps, how):
    """Alters the images of some steps as they leave the feed."""
    batches = Feed.batches

    def altered(self, first, last):
        for step, batch in enumerate(batches(self, first, last), start=first):
            if step in steps:
                how(batch.images)
            yield batch

    monkeypatch.setattr(Feed, "batches", altered)


def nan_pixel(images):
    images[1, 0, 3, 3] = float("nan")


def test_one_nan_image_is_left_out_kept_and_explained(tiny, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, {2}, nan_pixel)
    folder = RunFolder(tmp_path / "run")
    export = pretrain(tiny(), folder, quiet=True)
    assert all(tensor.isfinite().all() for tensor in weights(export).values())
    assert [row.get("skipped") for row in folder.rows()] == [None, None, 1, None, None, None]
    assert "Step 2 is not finite" in caplog.text
    assert "1 of at most 3" in caplog.text
    assert "1 steps were not finite" in caplog.text
    found = replay(folder.path / "refused" / "step_00000002")
    assert found.step == 2
    assert len(found.images) == 1
    assert found.images[0].endswith(".png")
    assert np.isnan(found.terms["loss"])
    assert found.layer.endswith("patch_embed.proj")
    assert any("pixels that are not finite" in sentence for sentence in found.sentences())


def test_the_run_stops_after_the_limit(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 4}, nan_pixel)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(NotFiniteError, match=r"Step 4 is not finite .* as 2 before it"):
        pretrain(tiny(guard={"most_skipped": 2}), folder, quiet=True)
    kept = sorted(path.name for path in (folder.path / "refused").iterdir())
    assert kept == ["step_00000001"]  # the first says it; a folder of each would fill the disk


def test_an_infinite_loss_is_explained_by_the_weights(tiny, tmp_path, monkeypatch):
    step = loop.one_step

    def blown_up(run, crops, knobs):
        if knobs.step == 3:
            with torch.no_grad():
                run.learner.student["dino_head"].last_layer.weight[0] = float("inf")
        return step(run, crops, knobs)

    monkeypatch.setattr(loop, "one_step", blown_up)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(NotFiniteError, match="Step 3 is not finite"):
        pretrain(tiny(guard={"most_skipped": 0}), folder, quiet=True)
    found = replay(folder.path / "refused" / "step_00000003")
    assert not found.images
    assert found.layer == "student.dino_head.last_layer"
    assert any("lower optim.lr" in sentence for sentence in found.sentences())


def test_duplicates_and_constant_images_do_no_harm(tiny, tmp_path, photographs, caplog):
    for name in ("a", "b"):
        Image.new("RGB", (50, 40), (90, 90, 90)).save(photographs / f"flat_{name}.png")
    for index in range(4):
        (photographs / f"twin_{index}.png").write_bytes((photographs / "0.png").read_bytes())
    folder = RunFolder(tmp_path / "run")
    export = pretrain(tiny(optim={"batch_size": 16}, steps=8), folder, quiet=True)
    assert all(tensor.isfinite().all() for tensor in weights(export).values())
    rows = folder.rows()
    assert not any("skipped" in row for row in rows)
    # 16 rows at distance 1e-8 would give 15; near-duplicates are let alone.
    assert all(row["koleo"] < 9 for row in rows)


def test_a_batch_of_nothing_but_duplicates_has_no_koleo(tiny, tmp_path, photographs):
    for path in photographs.iterdir():
        path.write_bytes((photographs / "0.png").read_bytes())
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(), folder, quiet=True)
    assert {row["koleo"] for row in folder.rows()} == {0.0}


def test_a_full_disk_costs_one_state_and_not_the_run(tiny, tmp_path, monkeypatch, caplog):
    save, full = checkpoint.save, {4}

    def no_room(folder, tensors, meta, **told):
        if meta.progress.step in full:
            raise DiskFullError("no space left: 1 MB needed, 0 free")
        return save(folder, tensors, meta, **told)

    monkeypatch.setattr(checkpoint, "save", no_room)
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(), folder, quiet=True)
    assert "a state was not saved" in caplog.text
    names = [path.name for path in checkpoint.checkpoints(folder.checkpoints)]
    assert names == ["step_00000002", "step_00000006"]
    full.add(6)
    last = RunFolder(tmp_path / "last")
    with pytest.raises(DiskFullError, match="no space left"):
        pretrain(tiny(), last, quiet=True)
    full.clear()
    again = weights(pretrain(tiny(), last, resume=True, quiet=True))
    assert all(torch.equal(again[k], v) for k, v in weights(folder.export).items())


def test_a_damaged_newest_state_is_passed_over(tiny, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    whole = weights(pretrain(tiny(), folder, quiet=True))
    newest = folder.checkpoints / "step_00000006"
    piece = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    piece.write_bytes(piece.read_bytes()[:1000])
    again = weights(pretrain(tiny(), folder, resume=True, quiet=True))
    assert "step_00000006 is damaged and was passed over" in caplog.text
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_an_edited_recipe_is_refused_with_the_differences_or_accepted(tiny, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(steps=4), folder, quiet=True)
    edited = tiny(steps=6, optim={"lr": 0.5})
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.001 -> 0\.5; steps: 4 -> 6") as told:
        pretrain(edited, folder, resume=True, quiet=True)
    assert "--accept-changes" in str(told.value)
    pretrain(edited, folder, resume=True, accept_changes=True, quiet=True)
    assert "goes on with other settings: optim.lr: 0.001 -> 0.5" in caplog.text
    assert json.loads(folder.recipe_file.read_text())["steps"] == 6
    assert json.loads((folder.path / "recipe_before_1.json").read_text())["steps"] == 4


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_the_same_command_goes_on(tiny, tmp_path, in_front_of):
    whole = weights(pretrain(tiny(), RunFolder(tmp_path / "a"), quiet=True))
    folder = RunFolder(tmp_path / "b")
    in_front_of(2, terminate)
    with pytest.raises(Preempted, match="saved step 3 of 6") as told:
        pretrain(tiny(), folder, resume=True, quiet=True)
    assert told.value.exit_code == 75
    assert checkpoint.checkpoints(folder.checkpoints)[-1].name == "step_00000003"
    in_front_of()
    again = weights(pretrain(tiny(), folder, resume=True, quiet=True))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_sigterm_in_the_last_step_saves_that_step(tiny, tmp_path, in_front_of):
    folder = RunFolder(tmp_path / "b")
    in_front_of(5, terminate)
    with pytest.raises(Preempted, match="saved step 6 of 6"):
        pretrain(tiny(), folder, quiet=True)
    assert checkpoint.checkpoints(folder.checkpoints)[-1].name == "step_00000006"


def test_sigterm_at_the_end_of_a_phase_ends_the_run(tiny, tmp_path, monkeypatch):
    deliver, folder = Watch.deliver, RunFolder(tmp_path / "run")

    def terminated(self):
        terminate()
        return deliver(self)

    recipe = tiny(phases=[{"name": "a"}, {"name": "b"}], steps=2)
    monkeypatch.setattr(Watch, "deliver", terminated)
    with pytest.raises(Preempted, match="finished the phase a"):
        pretrain(recipe, folder, quiet=True)
    monkeypatch.undo()
    assert pretrain(recipe, folder, resume=True, quiet=True).is_dir()


def test_a_second_sigterm_is_the_systems_own():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with stoppable() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.asked
            assert not seen
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_no_refused_step_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="is no refused step"):
        replay(tmp_path / "refused" / "step_00000001")

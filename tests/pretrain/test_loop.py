"""Whole runs: they learn, export, resume to the bit, and refuse what cannot work."""

import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino_adapters.backbones import load_backbone
from dino_adapters.contracts import (
    CheckpointError,
    DataError,
    RecipeError,
    RunFolderError,
    ShapeError,
    UnitsError,
)
from dino_adapters.pretrain import checkpoint, loop, pretrain
from dino_adapters.pretrain.checkpoint import checkpoints
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.recipes.sections import ModelRecipe
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import ALONE


def weights(export):
    return load_file(export / "model.safetensors")


def test_a_run_leaves_rows_checkpoints_snapshots_and_a_backbone(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    export = pretrain(tiny(checkpoint={"snapshots": 2}), folder, quiet=True)
    rows = folder.rows()
    assert [row["step"] for row in rows] == list(range(6))
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["images"] == 24
    assert [path.name for path in checkpoints(folder.checkpoints)] == [
        "step_00000004",
        "step_00000006",
    ]
    assert sorted(p.name for p in (folder.path / "snapshots").iterdir()) == [
        "step_00000002",
        "step_00000004",
    ]
    backbone = load_backbone(export)
    assert backbone.info.training["steps"] == 6
    assert backbone.info.training["method"] == "DINO + iBOT + KoLeo"
    assert backbone(torch.zeros(1, 3, 24, 24)).cls.shape == (1, 24)


def test_the_export_is_the_teacher(tiny, tmp_path, state_of):
    folder = RunFolder(tmp_path / "run")
    export = pretrain(tiny(), folder, quiet=True)
    state = state_of(folder.checkpoints / "step_00000006")
    for name, tensor in weights(export).items():
        assert torch.equal(tensor, state["teacher"][f"backbone.{name}"]), name


def test_weights_move_and_the_loss_falls(tiny, tmp_path):
    recipe = tiny(steps=60, optim={"lr": 3e-3, "batch_size": 8}, schedule={"warmup": 0.05})
    folder = RunFolder(tmp_path / "run")
    pretrain(recipe, folder, quiet=True)
    losses = [row["loss"] for row in folder.rows()]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.05


# Boundaries of the six steps: the warm-up ends at 1, the ramp of the Gram weight at 2, the frozen
# prototypes at 3, states are kept at 2 and 4, the Gram teacher is replaced after 2, 4 and 6.
BOUNDARIES = {
    "schedule": {"warmup": 1 / 6, "freeze_last_layer": 0.5, "temperature_warmup": 0.5},
    "gram": {"refresh_every": 2, "ramp": 1 / 3},
}


@pytest.mark.parametrize(("workers", "step"), [*((0, step) for step in range(6)), (2, 4)])
def test_resuming_repeats_the_uninterrupted_run_to_the_bit(
    tiny, tmp_path, monkeypatch, workers, step
):
    told = {"model": {"drop_path": 0.3}, **BOUNDARIES}
    recipe = tiny(data={"workers": workers}, **told)
    whole = weights(pretrain(tiny(**told), RunFolder(tmp_path / "a"), quiet=True))
    folder = RunFolder(tmp_path / "b")
    noted = RunFolder.note

    def stop(self, row):
        if row["step"] == step:
            raise KeyboardInterrupt
        noted(self, row)

    monkeypatch.setattr(RunFolder, "note", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder, quiet=True)
    monkeypatch.undo()
    again = weights(pretrain(recipe, folder, resume=True, quiet=True))
    assert set(again) == set(whole)
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name
    assert [row["step"] for row in folder.rows()] == list(range(6))


def test_a_folder_with_a_run_is_left_alone(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(), folder, quiet=True)
    before = weights(folder.export)
    with pytest.raises(RunFolderError, match="already holds a run"):
        pretrain(tiny(seed=1), folder, quiet=True)
    assert all(torch.equal(before[k], v) for k, v in weights(folder.export).items())


def test_a_folder_with_other_files_is_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="holds other files"):
        pretrain(tiny(), RunFolder(tmp_path), quiet=True)


def test_resume_under_another_recipe_names_the_difference(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(), folder, quiet=True)
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.001 -> 0\.5"):
        pretrain(tiny(optim={"lr": 0.5}), folder, resume=True, quiet=True)


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(), folder, quiet=True)
    state = folder.checkpoints / "step_00000006" / "meta.json"
    before = state.stat()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pretrain(tiny(), folder, resume=True, quiet=True)
    assert "nothing is left to train: step 6 of 6" in caplog.messages
    assert not any("passes)" in line for line in caplog.messages)  # no run is announced
    assert (state.stat().st_mtime_ns, state.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_the_precision_of_the_device_is_settled_once(tiny, tmp_path, caplog):
    """As a run on CUDA that goes on on a CPU: `auto` must not change its arithmetic."""
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(steps=2, precision="auto"), folder, quiet=True)
    path = folder.checkpoints / "step_00000002"
    meta = checkpoint.meta_of(path)
    assert meta.inputs["precision"] == "fp32"
    tensors = checkpoint.blank(path, "", torch.device("cpu"))
    checkpoint.load(path, tensors, ALONE)
    meta.inputs["precision"] = "bf16"
    checkpoint.save(folder.checkpoints, tensors, meta, keep=1, world=ALONE)
    run = loop.assemble(tiny(steps=2), folder, resume=True)
    assert run.recipe.precision == "bf16"
    assert isinstance(run.learner, SelfDistillation)
    assert run.learner.bf16
    assert "precision stays bf16" in caplog.text


def test_nothing_of_a_step_that_is_not_finite_is_applied(tiny, tmp_path, monkeypatch):
    """Networks, centres, Gram teacher and moments stay as they were; the run goes on."""
    recipe = tiny(objective={"centering": "softmax"}, gram={"refresh_every": 2})
    folder = RunFolder(tmp_path / "run")
    run = loop.assemble(recipe, folder, resume=False)
    monkeypatch.setattr(loop, "assemble", lambda *_, **__: run)
    crops, before = run.crops, {}

    def poisoned(step, batch):
        made = crops(step, batch)
        if step == 3:
            made.global_crops[0] = float("nan")
            before.update(copy.deepcopy(everything(run)))
        if step == 4:
            after = everything(run)
            assert set(after) == set(before)
            for name, tensor in after.items():
                assert torch.equal(tensor, before[name]), name
            before["seen"] = True
        return made

    run.crops = poisoned
    pretrain(recipe, folder, quiet=True)
    assert before["seen"]
    assert {name.split(".")[0] for name in before} >= {"student", "teacher", "centers", "gram"}
    assert any(name.endswith("exp_avg_sq") for name in before)
    rows = folder.rows()
    assert [row.get("skipped") for row in rows] == [None, None, None, 1, None, None]
    assert rows[3]["loss"] is None
    assert run.progress.skipped == 1


def everything(run):
    """All tensors of a run by name: networks, centres, Gram teacher and moments."""
    state = run.learner.state()
    found = {f"{part}.{name}": t for part, told in state.items() for name, t in told.items()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        found |= {f"moments.{index}.{name}": value for name, value in moments.items()}
    return found


def test_bad_files_among_good_ones_are_skipped_and_named(tiny, tmp_path, photographs, caplog):
    whole = (photographs / "0.png").read_bytes()
    (photographs / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "page.jpg").write_text("<html>not found</html>")
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(photographs / "speck.png")
    with caplog.at_level("INFO"):
        pretrain(tiny(data={"max_unreadable": 0.3}, steps=5), RunFolder(tmp_path / "r"), quiet=True)
    (line,) = [m for m in caplog.messages if "unreadable file skipped (3×)" in m]
    assert all(name in line for name in ("cut.png", "page.jpg", "speck.png"))


def test_too_many_bad_files_stop_the_run(tiny, tmp_path, photographs):
    for index in range(3):
        (photographs / f"{index}.png").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        pretrain(tiny(), RunFolder(tmp_path / "run"), quiet=True)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_images_need_their_range(tiny, tmp_path, dtype):
    folder = tmp_path / "deep"
    folder.mkdir()
    rasterio = pytest.importorskip("rasterio")
    for index in range(4):
        values = np.random.default_rng(index).random((2, 40, 40)) * 4000
        with rasterio.open(
            folder / f"{index}.tif",
            "w",
            width=40,
            height=40,
            count=2,
            dtype=np.dtype(dtype).name,
            transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
            crs="EPSG:32632",
        ) as opened:
            opened.write(values.astype(dtype))
    told = {"source": str(folder), "bands": ("nir", "swir")}
    with pytest.raises(UnitsError, match=r"data\.value_range"):
        pretrain(tiny(data=told), RunFolder(tmp_path / "a"), quiet=True)
    assert not (tmp_path / "a" / "recipe.json").exists()
    export = pretrain(
        tiny(data={**told, "value_range": (0, 4000)}), RunFolder(tmp_path / "b"), quiet=True
    )
    info = load_backbone(export).info
    assert [band.name for band in info.bands] == ["nir", "swir"]
    assert info.mean == pytest.approx((0.5, 0.5), abs=0.05)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"crops": {"global_size": 50}},
            "is 50 px, and vitmicro8 has patches of 8 px. Take crops.global_size=48",
        ),
        (
            {"crops": {"local_size": 20}},
            "is 20 px, and vitmicro8 has patches of 8 px. Take crops.local_size=16",
        ),
    ],
)
def test_a_crop_size_between_patches_is_named_with_its_neighbours(
    tiny, tmp_path, changes, sentence
):
    with pytest.raises(ShapeError, match=sentence):
        pretrain(tiny(**changes), RunFolder(tmp_path / "run"), quiet=True)


def test_sizes_that_no_patch_divides_are_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ShapeError, match="24"):
        pretrain(tiny(crops={"global_size": 27}), RunFolder(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_drop_path_of_a_foreign_network_is_refused(tiny, tmp_path):
    recipe = tiny(crops={"global_size": 64, "local_size": 32})
    recipe = recipe.model_copy(update={"model": ModelRecipe(source="resnet10t", drop_path=0.1)})
    with pytest.raises(RecipeError, match="drop_path"):
        pretrain(recipe, RunFolder(tmp_path / "run"), quiet=True)


def test_no_home_folder_or_host_reaches_the_run_folder(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    export = pretrain(tiny(), folder, quiet=True)
    card = (export / "card.json").read_text()
    assert str(tmp_path) not in card
    assert set(json.loads((folder.path / "environment.json").read_text())) == {
        "python",
        "system",
        "machine",
        "cores",
        "packages",
        "started",
    }


@pytest.mark.slow
def test_several_threads_repeat_to_the_bit(tiny, tmp_path):
    """Gradients of a network this size are summed by several threads."""
    recipe = tiny(
        crops={"global_size": 96, "local_size": 64}, optim={"batch_size": 16}, steps=5
    ).model_copy(update={"model": ModelRecipe(source="tf_efficientnet_lite0")})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (
            weights(pretrain(recipe, RunFolder(tmp_path / name), quiet=True)) for name in "ab"
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert not torch.are_deterministic_algorithms_enabled()

"""Several processes train as one: over gloo, with whole and with divided states."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dino_adapters.contracts import RecipeError
from dino_adapters.pretrain import pretrain
from dino_adapters.pretrain.assemble import check_division
from dino_adapters.pretrain.parallel import BUCKET, buckets, divide
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import World

SCRIPT = Path(__file__).with_name("train_rank.py")
LIMIT_S = 300


def started(recipe, folder, processes, *, stop=None):
    """Runs a job in processes of its own, and returns its exit status."""
    told = folder.with_suffix(".json")
    told.write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")
    words = [str(SCRIPT), str(told), str(folder), *([] if stop is None else [str(stop)])]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        words = [*launcher, f"--nproc-per-node={processes}", *words]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if stop is None and done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


def weights(folder):
    return load_file(folder / "export" / "model.safetensors")


def losses(folder):
    return [row["loss"] for row in RunFolder(folder).rows_with("loss")]


def close(ours, theirs, tolerance):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        gap = float((ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6))
        assert gap < tolerance, (name, gap)


@pytest.fixture
def job(tiny):
    """Twenty steps in which rounding stays small: no RoPE draws, layers of full gain."""

    def make(**changes):
        told = {
            "model": {"architecture": {"rope_rescale": None, "layerscale": 1.0}},
            "optim": {"lr": 3e-4, "batch_size": 8},
            "steps": 20,
            "checkpoint": {"every_steps": 5},
        }
        return tiny(**told | changes)

    return make


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_are_one_with_the_same_batch(job, tmp_path, sharding):
    recipe = job(parallel={"sharding": sharding})
    pretrain(recipe, RunFolder(tmp_path / "one"), quiet=True)
    started(recipe, tmp_path / "two", 2)
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    close(weights(tmp_path / "two"), weights(tmp_path / "one"), 2e-3)


@pytest.mark.slow
def test_states_reshard_from_two_processes_to_one_and_back(job, tmp_path):
    recipe = job(parallel={"sharding": "full"})
    pretrain(recipe, RunFolder(tmp_path / "one"), quiet=True)
    for processes, stop in ((2, 6), (1, 12), (2, 17), (4, None)):
        started(recipe, tmp_path / "moved", processes, stop=stop)
    close(weights(tmp_path / "moved"), weights(tmp_path / "one"), 2e-3)
    assert len(losses(tmp_path / "moved")) == 20


def test_gradients_travel_in_buckets_of_one_dtype():
    large = torch.empty(BUCKET // 4 + 1)
    small = [torch.empty(3), torch.empty(5)]
    half = torch.empty(2, dtype=torch.bfloat16)
    found = buckets([*small, large, half, *small])
    sizes = [[gradient.numel() for gradient in bucket] for bucket in found]
    assert sizes == [[3, 5], [large.numel()], [2], [3, 5]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_place_of_a_batch_belongs_to_one_process(size):
    places = [place for rank in range(size) for place in divide(8, World(rank, size))]
    assert places == list(range(8))


def test_a_batch_that_cannot_be_shared_is_refused(tiny):
    recipe = tiny(optim={"batch_size": 10})
    check_division(recipe, World(0, 2))
    with pytest.raises(RecipeError, match=r"is 10, which 4 processes .* Take 8 or 12"):
        check_division(recipe, World(0, 4))


def test_gram_across_the_batch_does_not_divide(tiny):
    recipe = tiny(gram={"level": "batch"})
    check_division(recipe, World())
    with pytest.raises(RecipeError, match=r"gram\.level=image"):
        check_division(recipe, World(0, 2))
    with pytest.raises(RecipeError, match=r"gram\.level=image"):
        check_division(recipe.changed({"parallel": {"micro_batch": 2}}), World())

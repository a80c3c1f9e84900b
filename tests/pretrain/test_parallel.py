"""Several processes train as one: over gloo, with whole and with divided states."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from dino_adapters.backbones import ConvNeXt, ConvNeXtConfig, build_network
from dino_adapters.contracts import DiskFullError, RecipeError
from dino_adapters.pretrain import assemble, guard, pretrain
from dino_adapters.pretrain.assemble import check_division
from dino_adapters.pretrain.feed import Feed
from dino_adapters.pretrain.parallel import BUCKET, blocks_of, buckets, divide
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import World

SCRIPT = Path(__file__).with_name("train_rank.py")
LIMIT_S = 300
NETWORKS = {
    "ViT": {},
    "ConvNeXt": {
        "source": "cnx_tiny",
        "architecture": {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 24], "layerscale": 1.0},
    },
    "timm": {"source": "test_convnext"},
}


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


@pytest.fixture
def group_of_one(tmp_path, monkeypatch):
    """A process group of this process alone, and how often networks were divided in it."""
    divided = []
    shard = assemble.shard_networks

    def noted(learner, world):
        shard(learner, world)
        divided.append(all(hasattr(p, "to_local") for p in learner.students[""].parameters()))

    monkeypatch.setattr(assemble, "shard_networks", noted)
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield divided
    dist.destroy_process_group()


@pytest.fixture
def guided(job, tmp_path, photographs):
    """A job for a network by its kind, with guides that learn a class and a number."""
    table = tmp_path / "table.csv"
    rows = [f"{path.name},{'ab'[i % 2]},{i % 3}" for i, path in enumerate(photographs.iterdir())]
    table.write_text("\n".join(["path,site,age", *rows]), encoding="utf-8")
    guides = [
        {"column": "site", "kind": "classification", "effect": "repel", "weight": 0.3},
        {"column": "age", "kind": "regression", "weight": 0.3},
    ]

    def make(network, **changes):
        large = {"crops": {"global_size": 64, "local_size": 32}} if network != "ViT" else {}
        recipe = job(
            guides=[guide | {"hidden_dim": 8} for guide in guides],
            data={"source": str(photographs), "metadata": str(table), "workers": 0},
            steps=6,
            **large,
            **changes,
        )
        told = recipe.model_dump(mode="json")
        return type(recipe).model_validate(told | {"model": NETWORKS[network] or told["model"]})

    return make


@pytest.mark.parametrize("network", NETWORKS)
def test_a_divided_group_of_one_is_one_process(network, guided, tmp_path, request):
    recipe = guided(network, parallel={"sharding": "full"})
    pretrain(recipe, RunFolder(tmp_path / "plain"), quiet=True)
    divided = request.getfixturevalue("group_of_one")
    folder = RunFolder(tmp_path / "group")
    pretrain(recipe, folder, quiet=True)
    assert divided == [True]
    assert losses(folder.path) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    close(weights(folder.path), weights(tmp_path / "plain"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_two_processes_divide_any_network_and_its_guides(network, guided, tmp_path):
    recipe = guided(network, parallel={"sharding": "full"})
    pretrain(recipe, RunFolder(tmp_path / "one"), quiet=True)
    started(recipe, tmp_path / "two", 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    close(weights(tmp_path / "two"), weights(tmp_path / "one"), 2e-3)


def test_blocks_come_before_what_holds_them():
    own = ConvNeXt(ConvNeXtConfig(depths=(1, 2), dims=(8, 8)))
    assert len(blocks_of(own)) == 3
    for network in (own, build_network("test_convnext")[0], build_network("vitmicro8")[0]):
        found = blocks_of(network)
        assert found
        assert not any(isinstance(block, nn.ModuleList) for block in found)  # it is never called
        for place, block in enumerate(found):
            later = found[place + 1 :]
            assert not any(inner in later for inner in block.modules())


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_refused_step_that_cannot_be_kept_does_not_end_the_run(
    number, tiny, tmp_path, monkeypatch, caplog
):
    batches = Feed.batches

    def with_a_nan(self, first, last):
        for step, batch in enumerate(batches(self, first, last), start=first):
            if step in {1, 3}:
                batch.images[0, 0, 0, 0] = float("nan")
            yield batch

    def full(path, tensors, metadata=None):
        path.write_bytes(b"half")
        if "step_00000001" in str(path):
            raise OSError(number, os.strerror(number))
        write(path, tensors, metadata)

    write = guard.write_tensors
    monkeypatch.setattr(Feed, "batches", with_a_nan)
    monkeypatch.setattr(guard, "write_tensors", full)
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(), folder, quiet=True)
    assert "The images of step 1 are not kept." in caplog.text
    assert os.strerror(number) in caplog.text
    assert ("MB are free" in caplog.text) == (number == errno.ENOSPC)
    # Nothing of it stays, and the next one is kept whole.
    assert [path.name for path in (folder.path / "refused").iterdir()] == ["step_00000003"]
    assert len(guard.kept_batch(folder.path / "refused" / "step_00000003").keys) == 4


def test_a_refused_step_without_its_state_is_not_kept(tiny, tmp_path, monkeypatch):
    recipe = tiny(steps=1)
    run = assemble.assemble(recipe, RunFolder(tmp_path / "run"), resume=False)
    _, batch = next(run.batches())

    def no_room(*_, **__):
        raise DiskFullError("1 MB are needed, and 0 MB are free.")

    monkeypatch.setattr(run, "save", no_room)
    place = tmp_path / "run" / "refused" / "step_00000000"
    with pytest.raises(DiskFullError):
        guard.keep_batch(run, place, batch)
    assert not place.exists()

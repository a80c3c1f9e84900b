"""Devices by name, and the processes of a job: each has the device that is its own."""

import socket

import pytest
import torch
import torch.distributed as dist

from dino_adapters.contracts import RecipeError
from dino_adapters.runtime import world as world_module
from dino_adapters.runtime.world import ALONE, World, joined, pick_device

TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of torchrun, and no others of it."""

    def told(**variables):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return told


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, and which of them was chosen."""
    chosen = []

    def found(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(world_module, "meet", lambda *_: None)
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        return chosen

    return found


@pytest.mark.parametrize(
    "name",
    ["meta", "xla", "vulkan", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CPU", "gpu", "", "mps:0"],
)
def test_other_devices_are_refused(name):
    with pytest.raises(RecipeError, match=r"is no device\. Use auto, cpu, cuda, cuda:N or mps"):
        pick_device(name)


def test_known_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_an_absent_gpu_is_said(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    with pytest.raises(RecipeError, match="torch finds no GPU"):
        pick_device(name)


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device() == torch.device("cuda")
    with pytest.raises(RecipeError, match="the last GPU is cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("there", [True, False])
def test_apple_gpus(there, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    if there:
        assert pick_device("mps") == torch.device("mps")
    else:
        with pytest.raises(RecipeError, match="no Apple GPU"):
            pick_device("mps")


def torchrun(size, local_rank):
    local = {"LOCAL_RANK": str(local_rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {"WORLD_SIZE": str(size), "RANK": str(local_rank), **local}


def test_one_process_of_torchrun_is_a_group_of_one(environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment(**torchrun(1, 0) | {"MASTER_PORT": str(port)})
    with joined("cpu") as world:
        assert world == World(0, 1, 0, grouped=True)
        assert dist.get_backend() == "gloo"
        with joined("cpu") as again:
            assert again == world
        assert dist.is_initialized()  # what was joined inside is left to the outer one
        world.wait()
        assert world.most(2.0, 3.0) == (2.0, 3.0)
        assert world.told("word") == "word"
    assert not dist.is_initialized()


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_process_without_torchrun_is_alone(variables, environment):
    environment(**variables)
    with joined("cpu") as world:
        assert world == ALONE
        assert not world.grouped
        assert not dist.is_initialized()


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}, {"RANK": "x", "LOCAL_RANK": "0"}])
def test_half_a_torchrun_is_refused(variables, environment):
    environment(WORLD_SIZE="2", **variables)
    with pytest.raises(RecipeError, match="WORLD_SIZE is 2, and RANK or LOCAL_RANK is no number"):
        joined("cpu").__enter__()


@pytest.mark.parametrize(
    ("device", "size", "local_rank", "expected"),
    [
        ("auto", 2, 1, [1, "nccl"]),
        ("cuda", 2, 0, [0, "nccl"]),
        ("cpu", 2, 1, ["gloo"]),
        ("cuda:1", 1, 0, [1, "nccl"]),
        ("auto", 1, 0, [0, "nccl"]),
    ],
)
def test_each_process_takes_its_own_gpu(device, size, local_rank, expected, environment, gpus):
    chosen = gpus(2)
    environment(**torchrun(size, local_rank))
    with joined(device) as world:
        assert world.grouped
        picked = pick_device(device, world)
    assert chosen == expected
    if picked.type == "cuda":
        assert (picked.index or 0) == expected[0]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(device, environment, gpus):
    chosen = gpus(2)
    environment(**torchrun(4, 2))
    match = r"process 3 on its machine, and torch finds 2 GPUs .* --nproc-per-node=2"
    with pytest.raises(RecipeError, match=match):
        joined(device).__enter__()
    assert not chosen  # nothing was begun


def test_several_processes_do_not_share_a_gpu(environment, gpus):
    chosen = gpus(4)
    environment(**torchrun(2, 0))
    with pytest.raises(RecipeError, match=r"'cuda:1' .* 2 processes would share it"):
        joined("cuda:1").__enter__()
    assert not chosen

"""The processes and the device that work runs on."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dino_adapters.contracts import RecipeError
from dino_adapters.runtime.meeting import meet

PATIENCE = timedelta(minutes=30)
"""How long ranks wait for each other: the first one evaluates and writes while others wait."""
TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a process group is made from, beside WORLD_SIZE."""
KNOWN = re.compile(r"cpu|mps|cuda(?::(\d{1,3}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one job, as torchrun or SLURM's srun with torchrun starts them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: number on this machine, which is that of its GPU.
        grouped: whether a process group runs, be it of this process alone; FSDP2 needs one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    grouped: bool = False

    @property
    def leads(self) -> bool:
        """Whether this process writes files and messages for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def most(self, *numbers: float) -> tuple[float, ...]:
        """The largest value of each number over all processes."""
        if self.size == 1:
            return numbers
        # On the device: nccl moves nothing else.
        found = torch.tensor(numbers, dtype=torch.float64, device=_reachable(self.local_rank))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def told(self, value: Any) -> Any:
        """The first process's value, for all of them: None, numbers, texts, lists, dicts."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=_reachable(self.local_rank))
        return box[0]


ALONE = World()


def _reachable(local_rank: int) -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun started together, or this one alone.

    One process that torchrun started is a group of one, so that a divided state can be tried on a
    single device.

    Args:
        device: as for `pick_device`; GPUs talk over nccl, CPUs over gloo.

    Raises:
        RecipeError: the variables of torchrun are there and make no sense, or the device is none
            that this process can have.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if dist.is_initialized() or (size == "1" and not all(name in os.environ for name in TORCHRUN)):
        yield current_world()
        return
    try:
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        world = World(rank, int(size), local_rank, grouped=True)
    except (KeyError, ValueError) as error:
        raise RecipeError(
            f"WORLD_SIZE is {size}, and RANK or LOCAL_RANK is no number ({error}). Start several "
            "processes with torchrun, or unset WORLD_SIZE."
        ) from error
    chosen = pick_device(device, world)
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen.index or 0)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=meet(rank, world.size, PATIENCE),
        rank=rank,
        world_size=world.size,
        timeout=PATIENCE,
    )
    try:
        yield world
    finally:
        # Networks that are divided hold the group; freed after it, they would end the process.
        gc.collect()
        dist.destroy_process_group()


def current_world() -> World:
    """The processes as they stand: those of a running process group, or this one alone."""
    if not dist.is_initialized():
        return ALONE
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, grouped=True)


def pick_device(name: str = "auto", world: World = ALONE) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; else the device as named.

    Of several processes on a machine each gets the GPU of its own number.

    Other devices of torch (`meta`, `xla`, ...) are refused: nothing here was tried on them.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        world: the processes.

    Raises:
        RecipeError: the name is none of these, the device is absent, or several processes would
            share a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    known = KNOWN.fullmatch(name)
    if known is None:
        raise RecipeError(f"'{name}' is no device. Use auto, cpu, cuda, cuda:N or mps.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("'mps' was asked for, but torch finds no Apple GPU. Use auto or cpu.")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise RecipeError(f"'{name}' was asked for, but torch finds no GPU. Use auto or cpu.")
        count = torch.cuda.device_count()
        if world.size > 1:
            return _own_gpu(name, world, count)
        if int(known[1] or 0) >= count:
            raise RecipeError(
                f"'{name}' was asked for, but the last GPU is cuda:{count - 1}. Use that or a "
                "lower number."
            )
    return torch.device(name)


def _own_gpu(name: str, world: World, count: int) -> torch.device:
    """The GPU of a process among several, by its number on the machine."""
    if name != "cuda":
        raise RecipeError(
            f"'{name}' was asked for, and {world.size} processes would share it, while each needs "
            "a GPU of its own. Use device=cuda, and choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    if world.local_rank >= count:
        raise RecipeError(
            f"This is process {world.local_rank + 1} on its machine, and torch finds {count} GPUs "
            f"there, while each process needs one of its own. Use --nproc-per-node={count}, make "
            "more visible in CUDA_VISIBLE_DEVICES, or use device=cpu."
        )
    return torch.device("cuda", world.local_rank)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Makes training on a CPU repeat to the bit with several threads, too.

    Without it, gradients of indexed tensors are summed in the order in which threads finish, and a
    run of a hundred steps ends two points of accuracy apart from its own repetition. On other
    devices nothing is changed: not every operation there has a form that repeats.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # costs time and mends nothing here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filling

"""The processes and the device that work runs on."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dino_adapters.contracts import RecipeError

PATIENCE = timedelta(minutes=30)
"""How long ranks wait for each other: the first one evaluates and writes while others wait."""
KNOWN = re.compile(r"cpu|mps|cuda(?::(\d{1,3}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one job, as torchrun or SLURM's srun with torchrun starts them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: number on this machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

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

    Args:
        device: as for `pick_device`; GPUs talk over nccl, CPUs over gloo.

    Raises:
        RecipeError: the variables of torchrun are there and make no sense.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1" or dist.is_initialized():
        yield current_world()
        return
    try:
        world = World(int(os.environ["RANK"]), int(size), int(os.environ["LOCAL_RANK"]))
    except (KeyError, ValueError) as error:
        raise RecipeError(
            f"WORLD_SIZE is {size}, and RANK or LOCAL_RANK is no number ({error}). Start several "
            "processes with torchrun, or unset WORLD_SIZE."
        ) from error
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def current_world() -> World:
    """The processes as they stand: those of a running process group, or this one alone."""
    if not dist.is_initialized():
        return ALONE
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def pick_device(name: str = "auto", world: World = ALONE) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; else the device as named.

    Of several processes on a machine each gets the GPU of its own number.

    Other devices of torch (`meta`, `xla`, ...) are refused: nothing here was tried on them.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        world: the processes.

    Raises:
        RecipeError: the name is none of these, or the device is absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world.size > 1:
        name = f"cuda:{world.local_rank}"
    known = KNOWN.fullmatch(name)
    if known is None:
        raise RecipeError(f"'{name}' is no device. Use auto, cpu, cuda, cuda:N or mps.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("'mps' was asked for, but torch finds no Apple GPU. Use auto or cpu.")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise RecipeError(f"'{name}' was asked for, but torch finds no GPU. Use auto or cpu.")
        count = torch.cuda.device_count()
        if int(known[1] or 0) >= count:
            raise RecipeError(
                f"'{name}' was asked for, but the last GPU is cuda:{count - 1}. Use that or a "
                "lower number."
            )
    return torch.device(name)


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

"""Checkpoints over real processes: `python checkpoint_ranks.py FOLDER`.

Four processes are forked from one, which has imported torch already. They meet in groups of two,
one, two and four, one after the other, and each group goes on from what the one before wrote. What
each stage found is left in FOLDER as plain tensors, for the test to compare.
"""

import errno
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dino_adapters.contracts import CheckpointError, DiskFullError
from dino_adapters.pretrain import checkpoint
from dino_adapters.pretrain.checkpoint import Meta, Progress
from dino_adapters.runtime.world import ALONE, World

LIMIT_S = 200


class Tiny(nn.Module):
    """Odd sizes, which four processes cannot share evenly, and a part that learns later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 7)
        self.gain = nn.Parameter(torch.ones(1))
        self.late = nn.Linear(2, 2)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x):
        return self.second(self.first(x).tanh()) * self.gain


class Setting:
    """Student, teacher and optimiser as a run has them."""

    def __init__(self, world: World, *, sharded: bool, seed: int) -> None:
        torch.manual_seed(seed)
        self.world, self.student, self.teacher = world, Tiny(), Tiny()
        if sharded:
            mesh = init_device_mesh("cpu", (world.size,))
            for network in (self.student, self.teacher):
                fully_shard(network, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.01)
        self.center = torch.full((1, 4), float(seed))

    def train(self, steps: int) -> None:
        for step in range(steps):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            loss = self.student(x[self.world.rank :: self.world.size]).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def networks(self):
        state = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "centers": {"dino": self.center},
        }
        return checkpoint.flatten(state)[0]

    def tensors(self):
        named = self.student.named_parameters()
        return self.networks() | checkpoint.flatten_optimizer(self.optimizer, named)

    def save(self, folder: Path, step: int) -> Path:
        meta = Meta(Progress(step, 1.0), {"world": self.world.size})
        return checkpoint.save(folder, self.tensors(), meta, keep=2, world=self.world)

    def load(self, path: Path) -> None:
        moments = checkpoint.blank_optimizer(path, self.student.named_parameters())
        checkpoint.load(path, self.networks() | moments, self.world)
        named = self.student.named_parameters()
        checkpoint.restore_optimizer(self.optimizer, named, moments)

    def leave(self, file: Path) -> None:
        whole = {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
            for name, t in self.tensors().items()
        }
        if self.world.leads:
            torch.save(whole, file)


def stage(folder: Path, name: str, rank: int, size: int, work) -> None:
    """Runs `work(world)` in the first `size` processes."""
    if rank >= size:
        return
    if size == 1:
        work(ALONE)
        return
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting_{name}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    work(World(rank, size, rank))
    dist.destroy_process_group()


def until(file: Path) -> None:
    """Waits for a file of an earlier stage."""
    for _ in range(LIMIT_S * 20):
        if file.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(str(file))


def expect(kind: type[Exception], words: str, call) -> None:
    try:
        call()
    except kind as error:
        if words not in str(error):
            raise
        return
    raise SystemExit(f"{kind.__name__} was not raised")


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    states = folder / "states"

    def two(world: World) -> None:
        run = Setting(world, sharded=True, seed=1)
        run.train(2)
        run.save(states, 1)
        run.leave(folder / "two.pt")
        run.train(1)  # what an uninterrupted run does next
        run.leave(folder / "uninterrupted.pt")

    def one(world: World) -> None:
        run = Setting(world, sharded=False, seed=2)
        run.load(states / "step_00000001")
        run.leave(folder / "one.pt")
        run.save(states, 2)

    def two_again(world: World) -> None:
        run = Setting(world, sharded=True, seed=3)
        run.load(states / "step_00000002")
        run.leave(folder / "two_again.pt")
        run.save(states, 3)
        run.train(1)
        run.leave(folder / "resumed.pt")
        plain = Setting(world, sharded=False, seed=4)  # as DDP has it: all of it everywhere
        plain.load(states / "step_00000003")
        plain.leave(folder / "whole.pt")
        plain.save(states, 4)

    def four(world: World) -> None:
        run = Setting(world, sharded=True, seed=5)
        run.load(states / "step_00000004")
        run.leave(folder / "four.pt")
        run.save(states, 5)
        trouble(run, world, states)
        run.leave(folder / "four_after.pt")

    for name, size, then in (
        ("two", 2, two),
        ("one", 1, one),
        ("two_again", 2, two_again),
        ("four", 4, four),
    ):
        stage(folder, name, rank, size, then)
        done = folder / f"done_{name}"
        if rank == 0:
            done.touch()
        until(done)


def trouble(run: Setting, world: World, states: Path) -> None:
    """One process alone meets it, and all of them say so."""
    real = FileSystemWriter.write_data
    if world.rank == 2:

        def no_room(self, plan, planner):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        FileSystemWriter.write_data = no_room
    expect(DiskFullError, "MB are free", lambda: run.save(states, 6))
    FileSystemWriter.write_data = real
    world.wait()
    left = sorted(os.listdir(states))
    if left != ["step_00000004", "step_00000005"]:
        raise SystemExit(f"left: {left}")

    # One process names its tensors otherwise.
    wanted = run.tensors()
    if world.rank == 3:
        wanted["student/other"] = torch.zeros(1)
    path = states / "step_00000005"
    expect(CheckpointError, "student/other", lambda: checkpoint.load(path, wanted, world))

    found, passed = checkpoint.newest_good(states, world)
    if found != path or passed:
        raise SystemExit(f"newest: {found}, {passed}")
    world.wait()
    if world.leads:
        last = sorted(path.glob("*.distcp"))[-1]
        data = bytearray(last.read_bytes())
        data[len(data) // 2] ^= 1
        last.write_bytes(data)
    world.wait()
    expect(
        CheckpointError, "as it was written", lambda: checkpoint.load(path, run.tensors(), world)
    )
    found, passed = checkpoint.newest_good(states, world)
    if found != states / "step_00000004" or len(passed) != 1:
        raise SystemExit(f"newest: {found}, {passed}")


if __name__ == "__main__":
    from multiprocessing import get_context

    # Forked: torch is imported once, and none of its threads runs yet.
    context = get_context("fork")
    processes = [
        context.Process(target=work, args=(rank, Path(sys.argv[1])), daemon=True)
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
    sys.exit(any(process.exitcode != 0 for process in processes))

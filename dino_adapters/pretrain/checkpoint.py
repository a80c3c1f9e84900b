"""Training states that outlive crashes, full disks and another number of processes.

    step_00000200/
        __0_0.distcp …  tensors, a file of each process that wrote some
        .metadata       where each piece of a tensor lies
        meta.json       what is no tensor, and a digest of every other file; written last

Tensors are in the format of `torch.distributed.checkpoint` (DCP), whole or sharded (`DTensor`), so
what two processes wrote opens in one or four. Nothing in a checkpoint is executed when it is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from dino_adapters.contracts import CheckpointError, DiskFullError
from dino_adapters.pretrain.checkpoint_files import (
    FORMAT,
    META,
    Reader,
    TensorPlanner,
    fault,
    read_index,
    read_meta,
    seal,
    steps,
)
from dino_adapters.pretrain.flat_state import (
    blank_optimizer,
    flatten,
    flatten_optimizer,
    restore_optimizer,
    unflatten,
)
from dino_adapters.pretrain.together import FULL, reason, together
from dino_adapters.runtime.files import json_digest, replace_folder, write_json
from dino_adapters.runtime.world import World

__all__ = [
    "Meta",
    "Progress",
    "blank",
    "blank_optimizer",
    "checkpoints",
    "flatten",
    "flatten_optimizer",
    "load",
    "meta_of",
    "names",
    "newest_good",
    "restore_optimizer",
    "save",
    "unflatten",
]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done.
        seconds: of training, spent on them.
        skipped: steps that were not finite, so that nothing was applied.
        rollbacks: how often the run went back.
        ended: whether it is over, perhaps before its last step.
    """

    step: int
    seconds: float
    skipped: int = 0
    rollbacks: int = 0
    ended: bool = False

    @property
    def pace(self) -> float:
        """Factor on all learning rates: halved whenever the run went back."""
        return 0.5**self.rollbacks


@dataclass(frozen=True, slots=True)
class Meta:
    """What a checkpoint holds beside tensors; all of it as JSON knows it, numbers being finite.

    Attributes:
        progress: how far the run has come.
        inputs: what it was fed (`resume.describe_inputs`), and the precision it was settled on.
        numbers: the plain values of a nested state, by joined name; see `flatten`.
    """

    progress: Progress
    inputs: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path, tensors: Mapping[str, Tensor], meta: Meta, *, keep: int, world: World
) -> Path:
    """Writes `step_NNNNNNNN/`, whole or not at all; called by all processes together.

    Then all but the last `keep` good ones go, and those of later steps: a run that stands here went
    back from them.

    Args:
        folder: of all checkpoints of the run, which all processes see.
        tensors: by name, the same names everywhere; plain ones are the same everywhere, too.
        meta: everything else; the first process's is written.
        keep: at least 1.
        world: the processes.

    Raises:
        DiskFullError: there is no room; nothing of this checkpoint is left, older ones all are.
        CheckpointError: it could not be written for another reason; the same is true.
    """
    # First of all: what JSON does not know is refused before anything is written.
    content = json.loads(json.dumps({"format": FORMAT} | asdict(meta), allow_nan=False))
    target = folder / f"step_{meta.progress.step:08d}"
    partial = folder / f".{target.name}.part"
    try:
        together(lambda: _begin(partial) if world.leads else None, world)
        together(lambda: _write(partial, tensors, world), world)
        listed = together(lambda: sorted(os.listdir(partial)) if world.leads else [], world)[0]
        own = listed[world.rank :: world.size]
        shares = together(lambda: {name: seal(partial / name) for name in own}, world)
        content["files"] = {name: sealed for share in shares for name, sealed in share.items()}
        together(lambda: _publish(partial, target, content) if world.leads else None, world)
    except Exception as error:
        if world.leads:
            shutil.rmtree(partial, ignore_errors=True)
        free = together(lambda: _free(folder), world)[0]
        need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        why = f"The checkpoint {target} could not be written ({error})."
        if free < need or (isinstance(error, OSError) and error.errno in FULL):
            raise DiskFullError(
                f"{why} It takes {need / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. Make "
                "room, and go on with --resume: earlier checkpoints are whole."
            ) from error
        raise CheckpointError(
            f"{why} Mend that, and go on with --resume: earlier checkpoints are whole."
        ) from error
    together(lambda: _prune(target, keep) if world.leads else None, world)
    return target


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    world: World,
    *,
    without: tuple[str, ...] = (),
) -> None:
    """Restores tensors in place; called by all processes together.

    Digests, names, shapes and dtypes are checked first, so that a refusal leaves all as it was.

    Args:
        path: a checkpoint.
        tensors: by name, all that it holds; sharded as they are now, not as they were.
        world: the processes.
        without: beginnings of names in the checkpoint that are left unread.

    Raises:
        CheckpointError: it is damaged, or of other networks; on all processes.
    """
    reader = Reader(path)

    def check() -> None:
        reader.check(tensors, without, share=(world.rank, world.size))

    def read() -> None:
        with _alone(world) as alone:
            load_sharded(
                dict(tensors), storage_reader=reader, planner=TensorPlanner(), no_dist=alone
            )

    together(check, world)
    try:
        together(read, world)
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {path} could not be read to its end ({error}), and what was loaded "
            "is half of it. Start again with --resume."
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; whether they are damaged is not looked at."""
    return [path for path in steps(folder) if (path / META).is_file()]


def newest_good(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written; called by all processes together.

    Returns:
        That one, or None, and a sentence for each damaged one that is newer.
    """
    passed = []
    for path in reversed(together(lambda: steps(folder), world)[0]):
        found = together(lambda path=path: fault(path, share=(world.rank, world.size)), world)
        if not any(found):
            return path, passed
        passed.append(f"{path} is damaged and was passed over: {next(filter(None, found))}.")
    return None, passed


def meta_of(path: Path) -> Meta:
    """What a checkpoint holds beside tensors.

    Raises:
        CheckpointError: its meta.json is missing or damaged.
    """
    content = read_meta(path)
    return Meta(Progress(**content["progress"]), content["inputs"], content["numbers"])


def names(path: Path) -> set[str]:
    """Names of the stored tensors.

    Raises:
        CheckpointError: the index is missing or damaged.
    """
    return set(read_index(path).state_dict_metadata)


def blank(path: Path, under: str, device: torch.device) -> dict[str, Tensor]:
    """Zeros in the shape of each stored tensor whose name begins with `under`, for `load`.

    For what a fresh run does not have yet, such as centres that come with the first step.

    Raises:
        CheckpointError: the index is missing or damaged.
    """
    stored = cast(dict[str, TensorStorageMetadata], read_index(path).state_dict_metadata)
    return {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype, device=device)
        for name, entry in stored.items()
        if name.startswith(under)
    }


class _Writer(FileSystemWriter):
    """Writes without a path of this machine in the index, and tells a full disk as such."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # What an error arose from is lost on its way to the other processes.
            raise reason(error) from error


def _begin(partial: Path) -> None:
    """Makes the folder, and removes what was left by a process that was killed here."""
    for left in partial.parent.glob(".step_*"):
        shutil.rmtree(left)
    partial.mkdir(parents=True)


def _write(partial: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with _alone(world) as alone:
        save_sharded(dict(tensors), storage_writer=_Writer(partial), planner=planner, no_dist=alone)


def _publish(partial: Path, target: Path, content: dict[str, Any]) -> None:
    write_json(partial / META, content | {"digest": json_digest(content)})
    _sync(partial)
    replace_folder(partial, target)
    _sync(target.parent)


def _prune(target: Path, keep: int) -> None:
    """Removes all but the last good ones up to the one that was just written."""
    found = steps(target.parent)
    until = found[: found.index(target) + 1]
    # Sizes alone: to digest all of them at every save would take longer than to write one.
    good = [path for path in until if fault(path, quick=True) is None]
    for path in set(found) - set(good[-keep:]):
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise CheckpointError(
                f"{target} was written, and the old checkpoint {path} cannot be removed ({error}). "
                "Change its permissions, and go on with --resume."
            ) from error


def _sync(folder: Path) -> None:
    """Brings the entries of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


@contextlib.contextmanager
def _alone(world: World) -> Iterator[bool]:
    """Whether there is one process; torch's warning that there is only one is left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield world.size == 1

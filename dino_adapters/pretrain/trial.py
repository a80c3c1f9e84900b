"""What a few real training steps take, measured in a process of its own.

A peak of memory means something in a fresh address space alone: an allocator keeps what it was once
given. So every trial starts this module anew, takes a few steps on the first real images, and
writes down what it saw. Nothing of it reaches a run's folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from dino_adapters import contracts
from dino_adapters.contracts import DinoAdaptersError, RecipeError
from dino_adapters.pretrain import announce
from dino_adapters.pretrain.assemble import build_run, import_modules, settle_precision
from dino_adapters.pretrain.checkpoint import Progress
from dino_adapters.pretrain.loop import one_step
from dino_adapters.pretrain.memory import available_bytes, peak_bytes
from dino_adapters.pretrain.optim import Timetable
from dino_adapters.pretrain.origin import Origin
from dino_adapters.pretrain.probe import sizes_for
from dino_adapters.pretrain.run import Run
from dino_adapters.pretrain.sizes import largest_global
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import ALONE, repeatable

UNTIMED = 2
"""Steps before timing begins: the first one sets up, and decodes."""
LEAST_STEPS, MOST_STEPS, ENOUGH_S = 5, 14, 6.0
"""A trial ends after the most steps, or after the least and so many seconds."""
DECODED = 8
"""Images that are timed while they are decoded."""


class NoRoomError(Exception):
    """A trial needed more memory than there is."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried.

    Attributes:
        recipe: of one phase, as JSON.
        start: what the phase starts from.
        earlier: folders of the phases before it, by name.
        export_to: run folder that gets the networks of the phase, instead of taking steps.
    """

    recipe: dict[str, Any]
    start: str = "fresh"
    earlier: Mapping[str, str] | None = None
    export_to: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a trial saw.

    Attributes:
        batch: images of a step.
        micro: images that go through the networks at once.
        peak_bytes: of the whole process; on CUDA, of the allocator.
        step_seconds: median over the steps after the first two.
        device: where it ran.
        available_bytes: memory of that device that was free at the start.
        precision: of the forward pass.
        network: name of the student, or of a distillation's teacher.
        backbone_parameters, head_parameters: of all students.
        trained_parameters: those with gradients.
        weight_bytes: of the students.
        gradient_bytes: while there are some.
        moment_bytes: AdamW's.
        average_bytes: of the moving averages, as far as they are not the students' own weights.
        teacher_bytes: of all other networks: Gram teacher, start, a distillation's teacher.
        with_ibot: whether patches are masked.
        patch_size: side of a patch in pixels, the coarsest.
        image_bytes: of a decoded image as it is kept in memory.
        decode_seconds: to read and decode one.
        look_seconds: of one image's forward pass at the global crops' size.
        look_sizes: sides in pixels that labelled images are looked at.
        warnings: given while the run was built, but for those on its settings.
    """

    batch: int
    micro: int
    peak_bytes: int
    step_seconds: float
    device: str
    available_bytes: int
    precision: str
    network: str
    backbone_parameters: int
    head_parameters: int
    trained_parameters: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    average_bytes: int
    teacher_bytes: int
    with_ibot: bool
    patch_size: int
    image_bytes: int
    decode_seconds: float
    look_seconds: float
    look_sizes: tuple[int, ...]
    warnings: tuple[str, ...]


def measure(trial: Trial) -> Measured:
    """Tries it in a new process.

    Raises:
        NoRoomError: memory did not suffice.
        DinoAdaptersError: what the run itself would have raised.
    """
    found = _elsewhere(trial)
    found |= {name: tuple(found[name]) for name in ("look_sizes", "warnings")}
    return Measured(**found)


def export_networks(trial: Trial) -> None:
    """Builds the networks of a phase and exports them, untrained, in a new process.

    Raises:
        DinoAdaptersError: what the run itself would have raised.
    """
    _elsewhere(trial)


def _elsewhere(trial: Trial) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(asdict(trial)), encoding="utf-8")
        # The same modules as here, and none that happen to lie in the present folder.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(question), str(answer)],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if answer.is_file():
            found = json.loads(answer.read_text(encoding="utf-8"))
        elif done.returncode < 0:
            raise NoRoomError  # the system ends a process that takes too much
        else:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"A trial of some training steps failed: {last}")
    if "no_room" in found:
        raise NoRoomError
    if "error" in found:
        raise getattr(contracts, found["error"], RecipeError)(found["sentence"])
    return found


def answer(question: Path, path: Path) -> None:
    """Does what a trial asks for, and writes down what came of it."""
    told = json.loads(question.read_text(encoding="utf-8"))
    trial = Trial(**told)
    try:
        found = tried(trial)
    except DinoAdaptersError as error:
        found = {"error": type(error).__name__, "sentence": str(error)}
    except (torch.OutOfMemoryError, MemoryError):
        found = {"no_room": True}
    except RuntimeError as error:
        if "not enough memory" not in str(error):  # the allocator's words on a CPU
            raise
        found = {"no_room": True}
    path.write_text(json.dumps(found), encoding="utf-8")


def stepping(trial: Trial) -> tuple[Run, Iterator[None]]:
    """A run that no folder knows of, and its steps: all that is known here of the loop."""
    recipe = PretrainRecipe.model_validate(trial.recipe)
    import_modules(recipe.imports)
    recipe = settle_precision(recipe, ALONE, None, None)
    earlier = {name: RunFolder(Path(path)) for name, path in (trial.earlier or {}).items()}
    run = build_run(recipe, ALONE, Origin(cast(Any, trial.start), earlier, True), Notices())
    timetable = Timetable(run.recipe)

    def steps() -> Iterator[None]:
        with repeatable(run.learner.device):
            for step, batch in run.batches():
                one_step(run, run.crops(step, batch), timetable.at(step))
                yield

    return run, steps()


def tried(trial: Trial) -> dict[str, Any]:
    """Takes the steps of a trial, or exports its networks; fields of `Measured`."""
    with heard() as warnings:
        run, steps = stepping(trial)
    if trial.export_to is not None:
        # As if trained: a network that no step changed would be refused as a teacher.
        run.progress = Progress(1, 0.0)
        run.export(RunFolder(Path(trial.export_to)).export)
        return {}
    device, batch = run.learner.device, run.recipe.optim.batch_size
    free = available_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Few images, so that they are soon decoded and steps are timed without that.
    run.feed.keys = run.feed.keys[: max(batch, DECODED)]
    seconds = timed(steps, device)
    peak = peak_bytes(device)
    decode_seconds, image_bytes = decoding(run)
    return asdict(
        Measured(
            batch=batch,
            micro=min(run.recipe.parallel.micro_batch or batch, batch),
            peak_bytes=peak,
            step_seconds=statistics.median(seconds[UNTIMED:]),
            device=str(device),
            available_bytes=free,
            precision=run.recipe.precision,
            network=run.infos[""].name,
            **weights(run),
            with_ibot=run.learner.with_ibot,
            patch_size=run.patch_size,
            image_bytes=image_bytes,
            decode_seconds=decode_seconds,
            **looking(run),
            warnings=tuple(warnings),
        )
    )


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collects warnings, but not what is said of settings: those of a trial are its own."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    handler.addFilter(lambda record: record.name != announce.LOGGER.name)
    package = logging.getLogger("dino_adapters")
    package.addHandler(handler)
    try:
        yield found
    finally:
        package.removeHandler(handler)


def timed(steps: Iterator[None], device: torch.device) -> list[float]:
    """Seconds of each step of a trial."""
    seconds: list[float] = []
    begun = before = time.perf_counter()
    for _ in steps:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds.append(now - before)
        if len(seconds) >= LEAST_STEPS and now - begun > ENOUGH_S:
            break
        before = time.perf_counter()
    return seconds


def weights(run: Run) -> dict[str, int]:
    """Numbers of parameters and bytes of state, counting shared tensors once."""
    seen: set[int] = set()

    def new_bytes(networks: Mapping[str, nn.Module]) -> int:
        tensors = [
            tensor
            for module in networks.values()
            for tensor in itertools.chain(module.parameters(), module.buffers())
        ]
        fresh = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        total = sum(size for place, size in fresh.items() if place not in seen)
        seen.update(fresh)
        return total

    students = run.learner.students
    backbones = [networks["backbone"] for networks in students.values()]
    backbone = sum(p.numel() for module in backbones for p in module.parameters())
    whole = sum(p.numel() for networks in students.values() for p in networks.parameters())
    moments = [
        tensor.numel() * tensor.element_size()
        for state in run.optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    ]
    return {
        "backbone_parameters": backbone,
        "head_parameters": whole - backbone,
        "trained_parameters": sum(p.numel() for p in run.trained),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in run.trained),
        "moment_bytes": sum(moments),
        "weight_bytes": new_bytes(students),
        "average_bytes": new_bytes(run.learner.averages),
        "teacher_bytes": new_bytes(run.learner.networks()),
    }


def decoding(run: Run) -> tuple[float, int]:
    """Seconds and bytes of one decoded image, means over a few."""
    keys = run.feed.keys[:DECODED]
    before = time.perf_counter()
    images = [run.feed.decode(key) for key in keys]
    seconds = (time.perf_counter() - before) / len(images)
    size = sum(image.numel() * image.element_size() for image in images) // len(images)
    return seconds, size


@torch.no_grad()
def looking(run: Run) -> dict[str, Any]:
    """Seconds of one image's forward pass, and the sizes of a look."""
    name, networks = next(iter(run.learner.averages.items()))
    info, side = run.infos[name], largest_global(run.recipe)
    count = min(run.recipe.optim.batch_size, DECODED)
    images = torch.zeros(count, len(info.bands), side, side, device=run.learner.device)
    images = images.contiguous(memory_format=torch.channels_last)
    found = []
    for _ in range(3):
        before = time.perf_counter()
        networks["backbone"](images).cls.sum().item()  # waits for the device
        found.append((time.perf_counter() - before) / count)
    return {
        "look_seconds": min(found),
        "look_sizes": sizes_for(info, side, run.feed.side),
    }


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]))

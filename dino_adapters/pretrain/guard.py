"""Steps that are not finite: left out, counted, kept for a second look, and at last the end."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_adapters.contracts import CheckpointError, NotFiniteError
from dino_adapters.pretrain.feed import Batch
from dino_adapters.pretrain.objective import Losses
from dino_adapters.pretrain.together import together
from dino_adapters.runtime.files import needs_room, write_json, write_tensors
from dino_adapters.runtime.runfolder import RunFolder

if TYPE_CHECKING:
    from dino_adapters.pretrain.run import Run

LOGGER = logging.getLogger(__name__)
KEYS, IMAGES, STATE = "keys.json", "images_{rank}.safetensors", "state"
FULL_ADVICE = "Make room to have a second look at such a step; earlier states are whole."


class Refused(Protocol):
    """A step that was not applied."""

    @property
    def losses(self) -> Losses:
        """Its losses."""
        ...

    @property
    def norms(self) -> dict[str, float]:
        """Norms of its gradients."""
        ...


def is_finite(losses: Losses, norms: dict[str, float]) -> bool:
    """Whether loss and gradient are numbers that may be applied."""
    return math.isfinite(math.hypot(*norms.values())) and math.isfinite(losses.total.item())


def refuse_step(run: Run, folder: RunFolder, batch: Batch, outcome: Refused) -> None:
    """Counts a step that was not applied, keeps the first one, and stops after too many.

    Where it cannot be kept, that is said, and the next one is.

    Raises:
        NotFiniteError: more steps than `guard.most_skipped` were not finite.
    """
    guard, step = run.recipe.guard, run.progress.step - 1
    run.progress = replace(run.progress, skipped=run.progress.skipped + 1)
    skipped = run.progress.skipped
    terms = ", ".join(f"{name} {value:g}" for name, value in outcome.losses.numbers().items())
    said = f"{terms}, gradient norm {math.hypot(*outcome.norms.values()):g}"
    place = folder.path / "refused" / f"step_{step:08d}"
    first = not any(place.parent.glob("step_*"))
    shown = ""
    if guard.save and run.world.told(first):
        try:
            keep_batch(run, place, batch)
            shown = f" See what was in it: dino-adapters pretrain --replay {place}"
        except (OSError, RuntimeError) as error:  # a second look is not worth the run
            LOGGER.warning("The images of step %d are not kept. %s", step, error)
    if skipped > guard.most_skipped:
        raise NotFiniteError(
            f"Step {step} is not finite ({said}), as {skipped - 1} before it, and "
            f"guard.most_skipped is {guard.most_skipped}; nothing of it was applied. Look for NaN "
            "in the images with `dino-adapters inspect`; if there is none, start anew with a "
            f"lower optim.lr in another --out.{shown}"
        )
    LOGGER.warning(
        "Step %d is not finite (%s); it is left out, %d of at most %d.%s",
        step,
        said,
        skipped,
        guard.most_skipped,
        shown,
    )


def keep_batch(run: Run, place: Path, batch: Batch) -> None:
    """Saves the images of a step, and the state that it was computed from.

    All processes must ask; where one fails, all do, and nothing stays.

    Raises:
        DiskFullError: there is no room.
        CheckpointError: the state cannot be written for another reason.
        RuntimeError: nor can the images.
    """
    rank, images = run.world.rank, batch.images.contiguous()

    def write() -> None:
        place.mkdir(parents=True, exist_ok=True)
        write_tensors(place / IMAGES.format(rank=rank), {"images": images, "looks": batch.looks})
        write_json(place / f"{rank}_{KEYS}", list(batch.keys))

    try:
        with needs_room(f"The batch {place}", place, images.nbytes * run.world.size, FULL_ADVICE):
            together(write, run.world)
        run.save(place / STATE, last_chance=True)
    except Exception:
        if run.world.leads:
            shutil.rmtree(place, ignore_errors=True)
        raise


def kept_batch(place: Path) -> Batch:
    """The images that all processes had in a kept step.

    Raises:
        CheckpointError: there are none.
    """
    held: list[dict[str, Tensor]] = []
    keys: list[str] = []
    try:
        for rank in range(len(list(place.glob(f"*_{KEYS}")))):
            held.append(load_file(place / IMAGES.format(rank=rank)))
            keys += json.loads((place / f"{rank}_{KEYS}").read_text(encoding="utf-8"))
        images, looks = (torch.cat([part[name] for part in held]) for name in ("images", "looks"))
        return Batch(images, tuple(keys), looks)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{place} holds no refused step ({type(error).__name__}). Give a folder "
            "refused/step_NNNNNNNN of a run that left out a step."
        ) from error

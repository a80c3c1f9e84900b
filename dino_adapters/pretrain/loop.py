"""The training loop: read it top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

from dino_adapters.contracts import NotFiniteError
from dino_adapters.pretrain.assemble import Run, assemble
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.checkpoint import Progress, save_checkpoint
from dino_adapters.pretrain.objective import Losses
from dino_adapters.pretrain.optim import Knobs, Timetable, clip, set_rates
from dino_adapters.pretrain.origin import FRESH, Origin, snapshot_folder
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices, duration, progress
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import repeatable

LOGGER = logging.getLogger(__name__)
ROWS = 500  # about so many rows of metrics.jsonl, however long the run


def train(
    recipe: PretrainRecipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    notices: Notices | None = None,
    origin: Origin = FRESH,
) -> Path:
    """Trains one phase and exports what it delivers; see `phases.pretrain`.

    Args:
        recipe: everything that decides the result, without phases.
        folder: where the phase lives.
        resume: go on from the last checkpoint.
        overwrite: replace a run that stands in the folder, once nothing is left to refuse.
        overrides: the words `key=value` behind the recipe, for the record.
        quiet: no progress display.
        notices: collects what was skipped, converted or assumed.
        origin: what it starts from.

    Returns:
        The export folder.
    """
    with folder.lock():
        # Everything slow, and every refusal, happens in here: nothing is spent before it returns.
        run = assemble(
            recipe,
            folder,
            resume=resume,
            overwrite=overwrite,
            overrides=overrides,
            notices=notices,
            origin=origin,
        )
        started = time.monotonic() - run.progress.seconds
        timetable, every = Timetable(recipe), max(1, recipe.steps // ROWS)

        left = recipe.steps - run.progress.step
        with repeatable(run.learner.device), progress("pretrain", left, quiet=quiet) as shown:
            for step, images in run.batches():
                knobs = timetable.at(step)
                crops = run.crops(step, images)
                run.seed_draws(step)
                losses, norms = one_step(run, crops, knobs)

                done = step + 1
                seconds = time.monotonic() - started
                if step % every == 0 or done == recipe.steps:
                    folder.note(row(losses, norms, knobs, recipe, seconds))
                # The snapshot first: a run that is killed between the two makes it again.
                if done in run.snapshot_steps:
                    run.export(snapshot_folder(folder, done), done, seconds)
                if done % recipe.checkpoint.every_steps == 0 and done < recipe.steps:
                    keep_state(run, folder, Progress(done, seconds))
                shown.step(note=f"loss {losses.total.item():.3f}")

        seconds = time.monotonic() - started
        if left:
            keep_state(run, folder, Progress(recipe.steps, seconds))
        LOGGER.info("%d steps in %s", recipe.steps, duration(seconds))
        if not origin.phased:  # a run of several phases says it once, at its end
            for line in run.notices.summary():
                LOGGER.info("%s", line)
        return run.export(folder.export, recipe.steps, seconds)


def one_step(run: Run, crops: Crops, knobs: Knobs) -> tuple[Losses, dict[str, float]]:
    """One step of DINOv3 (arXiv 2508.10104), in its order.

    Returns:
        The losses, and the gradient norm of each module before clipping.

    Raises:
        NotFiniteError: loss or gradient is not finite; then nothing was applied.
    """
    learner, optimizer, optim = run.learner, run.optimizer, run.recipe.optim
    learner.before(knobs.step)  # Gram teacher taken from the moving average, at its step
    set_rates(optimizer, knobs)  # frozen prototypes: rate 0, but gradients and moments go on
    optimizer.zero_grad(set_to_none=True)
    losses = learner.losses(crops, knobs)
    losses.total.backward()
    norms = clip(run.modules(), optim.clip, each=optim.clip_each)
    refuse_not_finite(losses, norms, knobs.step)
    optimizer.step()
    learner.after(knobs)  # moving average, then the Gram teacher's refresh, if due
    return losses, norms


def row(
    losses: Losses, norms: dict[str, float], knobs: Knobs, recipe: PretrainRecipe, seconds: float
) -> dict[str, float]:
    """What is noted of a step."""
    noted = {"step": knobs.step, **losses.numbers(), "lr": knobs.lr, "momentum": knobs.momentum}
    noted |= {"grad_norm": math.hypot(*norms.values())}
    noted |= {"teacher_temperature": knobs.teacher_temperature}
    noted |= {"images": (knobs.step + 1) * recipe.optim.batch_size, "seconds": round(seconds, 2)}
    return noted


def keep_state(run: Run, folder: RunFolder, done: Progress) -> None:
    """Saves the training state of a step."""
    save_checkpoint(
        folder.checkpoints,
        run.learner,
        run.optimizer,
        done,
        inputs=run.inputs,
        keep=run.recipe.checkpoint.keep,
    )


def refuse_not_finite(losses: Losses, norms: dict[str, float], step: int) -> None:
    """Stops before the optimiser and the moving average can spread a NaN.

    Raises:
        NotFiniteError: the loss or the gradient's norm is not finite.
    """
    norm = math.hypot(*norms.values())
    if math.isfinite(norm) and math.isfinite(losses.total.item()):
        return
    terms = ", ".join(f"{name} {value:g}" for name, value in losses.numbers().items())
    raise NotFiniteError(
        f"Step {step} is not finite ({terms}, gradient norm {norm:g}); nothing of it was applied. "
        "Look for NaN in the images with `dino-adapters inspect`; if there is none, start anew "
        "with a lower optim.lr in another --out."
    )

"""The training loop: read it top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

from dino_adapters.contracts import NotFiniteError
from dino_adapters.pretrain.assemble import Run, assemble
from dino_adapters.pretrain.checkpoint import Progress, save_checkpoint
from dino_adapters.pretrain.learner import Losses
from dino_adapters.pretrain.optim import clip, knobs_at, set_rates
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices, duration, progress
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import repeatable

LOGGER = logging.getLogger(__name__)
ROWS = 500  # about so many rows of metrics.jsonl, however long the run


def pretrain(
    recipe: PretrainRecipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    notices: Notices | None = None,
) -> Path:
    """Trains a student against its moving average and exports the teacher's backbone.

    Args:
        recipe: everything that decides the result.
        folder: where the run lives; new, or with `resume` one that holds a run of this recipe.
        resume: go on from the last checkpoint.
        overwrite: replace a run that stands in the folder, once nothing is left to refuse.
        overrides: the words `key=value` behind the recipe, for the record.
        quiet: no progress display.
        notices: collects what was skipped, converted or assumed.

    Returns:
        The export folder, for `load_backbone`.

    Raises:
        RunFolderError: the folder holds a run and `resume` is off.
        RecipeError, DataError, WeightsError: found before the first step.
        NotFiniteError: a loss or gradient was not finite; nothing of that step was applied.
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
        )
        learner, optimizer = run.learner, run.optimizer
        started = time.monotonic() - run.progress.seconds
        every = max(1, recipe.steps // ROWS)

        left = recipe.steps - run.progress.step
        with repeatable(learner.device), progress("pretrain", left, quiet=quiet) as shown:
            for step, images in run.batches():
                knobs = knobs_at(step, recipe)
                crops = run.crops(step, images)
                run.seed_draws(step)

                optimizer.zero_grad(set_to_none=True)
                losses = learner.losses(crops, knobs.teacher_temperature)
                losses.total.backward()
                norm = clip(learner.student.values(), recipe.optim.clip)
                refuse_not_finite(losses, norm, step)

                set_rates(optimizer, knobs)
                optimizer.step()
                learner.update_teacher(knobs.momentum)

                done = step + 1
                seconds = time.monotonic() - started
                if step % every == 0 or done == recipe.steps:
                    folder.note(
                        {"step": step, **losses.numbers(), "lr": knobs.lr}
                        | {"momentum": knobs.momentum, "grad_norm": norm}
                        | {"teacher_temperature": knobs.teacher_temperature}
                        | {"images": done * recipe.optim.batch_size, "seconds": round(seconds, 2)}
                    )
                # The snapshot first: a run that is killed between the two makes it again.
                if done in run.snapshot_steps:
                    run.export(folder.path / "snapshots" / f"step_{done:08d}", done, seconds)
                if done % recipe.checkpoint.every_steps == 0 and done < recipe.steps:
                    keep_state(run, folder, Progress(done, seconds))
                shown.step(note=f"loss {losses.total.item():.3f}")

        seconds = time.monotonic() - started
        keep_state(run, folder, Progress(recipe.steps, seconds))
        LOGGER.info("%d steps in %s", recipe.steps, duration(seconds))
        for line in run.notices.summary():
            LOGGER.info("%s", line)
        return run.export(folder.export, recipe.steps, seconds)


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


def refuse_not_finite(losses: Losses, norm: float, step: int) -> None:
    """Stops before the optimiser and the moving average can spread a NaN.

    Raises:
        NotFiniteError: the loss or the gradient's norm is not finite.
    """
    if math.isfinite(norm) and math.isfinite(losses.total.item()):
        return
    terms = ", ".join(f"{name} {value:g}" for name, value in losses.numbers().items())
    raise NotFiniteError(
        f"Step {step} is not finite ({terms}, gradient norm {norm:g}); nothing of it was applied. "
        "Look for NaN in the images with `dino-adapters inspect`; if there is none, start anew "
        "with a lower optim.lr in another --out."
    )

"""The training loop: read it top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dino_adapters.contracts import CollapseError, Preempted
from dino_adapters.pretrain.accumulate import accumulate
from dino_adapters.pretrain.assemble import assemble
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.guard import is_finite, refuse_step
from dino_adapters.pretrain.objective import Losses
from dino_adapters.pretrain.optim import Knobs, Timetable, clip, set_rates
from dino_adapters.pretrain.origin import FRESH, Origin, snapshot_folder
from dino_adapters.pretrain.parallel import average_gradients, average_losses
from dino_adapters.pretrain.run import Run
from dino_adapters.pretrain.together import together
from dino_adapters.pretrain.watch import Watch
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices, duration, progress
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.stopping import StopRequest, stoppable
from dino_adapters.runtime.world import World, joined, repeatable

LOGGER = logging.getLogger(__name__)
ROWS = 500  # about so many rows of metrics.jsonl, however long the run


def train(
    recipe: PretrainRecipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
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
        accept_changes: go on although settings differ from those that the run began with.
        overrides: the words `key=value` behind the recipe, for the record.
        quiet: no progress display.
        notices: collects what was skipped, converted or assumed.
        origin: what it starts from.

    Returns:
        The export folder.
    """
    with joined(recipe.device) as world, held(folder, world), stoppable() as request:
        told: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "overrides": overrides}
        told |= {"accept_changes": accept_changes, "notices": notices, "origin": origin}
        # A function of its own: its networks are gone before the processes part.
        return run_through(recipe, folder, world, request, quiet=quiet, **told)


def run_through(
    recipe: PretrainRecipe,
    folder: RunFolder,
    world: World,
    request: StopRequest,
    *,
    quiet: bool,
    origin: Origin,
    **told: Any,
) -> Path:
    """One phase from its assembly to its export; the arguments are those of `train`."""
    # Everything slow, and every refusal, happens in here: nothing is spent before it returns.
    run = assemble(recipe, folder, world=world, origin=origin, **told)
    watch = Watch(run, folder)
    begun, all_steps = run.progress.step, run.recipe.steps
    quiet = quiet or not world.leads
    watch.begin()
    with (
        repeatable(run.learner.device),
        progress("pretrain", all_steps, begun=begun, quiet=quiet) as shown,
    ):
        ended = done = begun >= all_steps or run.progress.ended
        while not ended:
            ended = steps(run, folder, watch, request, shown.step)
    if not done:
        run.progress = replace(run.progress, ended=run.progress.step < run.recipe.steps)
        run.save(folder.checkpoints, last_chance=True)
    LOGGER.info("%d steps in %s", run.progress.step, duration(run.progress.seconds))
    if run.progress.skipped:
        LOGGER.warning("%d steps were not finite and left out.", run.progress.skipped)
    if not origin.phased:  # a run of several phases says it once, at its end
        for line in run.notices.summary():
            LOGGER.info("%s", line)
    return watch.deliver()


@contextlib.contextmanager
def held(folder: RunFolder, world: World) -> Iterator[None]:
    """The folder's lock, held by the first process for all; where it is refused, all end."""
    with contextlib.ExitStack() as stack:
        together(lambda: stack.enter_context(folder.lock(only=world.leads)), world)
        yield


def steps(
    run: Run,
    folder: RunFolder,
    watch: Watch,
    request: StopRequest,
    shown: Callable[..., None],
) -> bool:
    """Trains until the end (True), or until the run goes back to an earlier state (False)."""
    recipe, before = run.recipe, run.progress.seconds
    timetable, every = Timetable(recipe, pace=run.progress.pace), max(1, recipe.steps // ROWS)
    started = time.monotonic()
    for step, batch in run.batches():
        knobs = timetable.at(step)
        outcome = one_step(run, run.crops(step, batch), knobs)

        done = step + 1
        seconds = before + time.monotonic() - started
        run.progress = replace(run.progress, step=done, seconds=seconds)
        if not outcome.applied:
            refuse_step(run, folder, batch, outcome)
        if step % every == 0 or done == recipe.steps or not outcome.applied:
            watch.note(row(outcome, knobs, run))
        # The snapshot first: a run that is killed between the two makes it again.
        if done in run.snapshot_steps:
            run.export(snapshot_folder(folder, done))
        if watch.is_due(done):
            paused = time.monotonic()
            found = watch.look()
            started += time.monotonic() - paused  # looking is no training
            if found.stops:  # not saved: resuming comes to the same end
                raise CollapseError(found.stops)
            if found.ends:
                return True
            if found.goes_back:
                watch.go_back()
                return False
        leaves = run.world.most(request.asked)[0] > 0
        due = done < recipe.steps and done % recipe.checkpoint.every_steps == 0
        if leaves or due:
            run.save(folder.checkpoints, last_chance=leaves)
        if leaves:
            raise Preempted(
                f"The job was told to end and saved step {done} of {recipe.steps}; the same "
                "command goes on from there (pretrain: with --resume)."
            )
        shown(note=f"loss {outcome.losses.total.item():.3f}")
    return True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step.

    Attributes:
        losses: without gradient.
        norms: of each module's gradient, before clipping.
        applied: whether it was; not, where a loss or gradient of any process was not finite.
    """

    losses: Losses
    norms: dict[str, float]
    applied: bool


def one_step(run: Run, crops: Crops, knobs: Knobs) -> Outcome:
    """One step of DINOv3 (arXiv 2508.10104), in its order.

    A loss or gradient that is not finite, on any process, leaves everything as it was.
    """
    learner, optimizer, optim = run.learner, run.optimizer, run.recipe.optim
    learner.before(knobs.step)  # Gram teacher taken from the moving average, at its step
    run.freeze(frozen=knobs.frozen)
    set_rates(optimizer, knobs)  # frozen prototypes: rate 0, but gradients and moments go on
    optimizer.zero_grad(set_to_none=True)
    losses = accumulate(
        learner,
        crops,
        knobs,
        micro_batch=run.recipe.parallel.micro_batch,
        seed_draws=lambda part: run.seed_draws(knobs.step, part),
    )
    losses = average_losses(losses, run.world)
    average_gradients(run.modules().values(), run.world)
    norms = clip(run.modules(), optim.clip, each=optim.clip_each)
    applied = run.world.most(not is_finite(losses, norms))[0] == 0
    if applied:
        optimizer.step()
        learner.after(knobs)  # moving average, then the Gram teacher's refresh, if due
    else:
        learner.forget()
    optimizer.zero_grad(set_to_none=True)
    return Outcome(losses, norms, applied)


def row(outcome: Outcome, knobs: Knobs, run: Run) -> dict[str, float]:
    """What is noted of a step."""
    noted: dict[str, float] = {"step": knobs.step, **outcome.losses.numbers(), "lr": knobs.lr}
    noted |= {"momentum": knobs.momentum, "grad_norm": math.hypot(*outcome.norms.values())}
    noted |= {"teacher_temperature": knobs.teacher_temperature}
    noted |= {"images": (knobs.step + 1) * run.recipe.optim.batch_size}
    noted |= {"seconds": round(run.progress.seconds, 2)}
    return noted if outcome.applied else noted | {"skipped": run.progress.skipped}

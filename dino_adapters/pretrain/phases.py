"""A whole run: one phase, or several in order, each starting from the one before."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dino_adapters.backbones.card import CARD
from dino_adapters.contracts import (
    Preempted,
    RecipeError,
    ShapeError,
    UnknownNameError,
    WeightsError,
)
from dino_adapters.data import load_source
from dino_adapters.pretrain.announce import say
from dino_adapters.pretrain.assemble import (
    NOTHING_TO_RESUME,
    import_modules,
    read_guides,
)
from dino_adapters.pretrain.build import make_learner
from dino_adapters.pretrain.delivery import copy_export, export_averages
from dino_adapters.pretrain.gate import GATE
from dino_adapters.pretrain.intake import Intake, count_images
from dino_adapters.pretrain.learner import Learner
from dino_adapters.pretrain.loop import held, train
from dino_adapters.pretrain.origin import Origin, snapshot_folder
from dino_adapters.pretrain.parallel import in_one_piece
from dino_adapters.pretrain.resolve import resolve
from dino_adapters.pretrain.resume import check_same_run
from dino_adapters.pretrain.sizes import snapshot_steps
from dino_adapters.pretrain.together import together
from dino_adapters.recipes.pretrain import PhaseRecipe, PretrainRecipe
from dino_adapters.recipes.sections import ModelRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.stopping import stoppable
from dino_adapters.runtime.world import joined

LOGGER = logging.getLogger(__name__)


def pretrain(
    recipe: PretrainRecipe,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    notices: Notices | None = None,
) -> Path:
    """Trains without labels and exports the backbone: the moving average of the student.

    Args:
        recipe: everything that decides the result.
        folder: where the run lives; new, or with `resume` one that holds a run of this recipe.
            Phases have folders of their own in it, `phases/1_NAME`, each like that of a run.
        resume: go on from the last checkpoint; finished phases are kept.
        overwrite: replace a run that stands in the folder, once nothing is left to refuse.
        accept_changes: go on although settings differ from those that the run began with.
        overrides: the words `key=value` behind the recipe, for the record.
        quiet: no progress display.
        notices: collects what was skipped, converted or assumed.

    Returns:
        The export folder, for `load_backbone`; a distillation of several students has an export in
        it for each.

    Raises:
        RunFolderError: the folder holds a run and `resume` is off.
        RecipeError, DataError, WeightsError: found before the first step.
        NotFiniteError: too many steps were not finite; nothing of them was applied.
        CollapseError: features collapsed, and the recipe says to stop then.
        Preempted: SIGTERM came, and the state was saved.
    """
    notices = Notices() if notices is None else notices
    refuse_unread_model(recipe)
    told: dict[str, Any] = {"quiet": quiet, "notices": notices, "accept_changes": accept_changes}
    if not recipe.phases:
        told |= {"resume": resume, "overwrite": overwrite, "overrides": overrides}
        return train(recipe, folder, **told)
    with joined(recipe.device) as world, held(folder, world), stoppable() as request:
        asked = recipe.model_dump(mode="json")
        import_modules(recipe.imports)
        # Once for all phases, so that they share batch and prototypes.
        recipe, reasons = resolve(recipe, count_images(recipe, notices))
        say(reasons)
        check_phases(recipe, notices)
        taken = (folder, asked, recipe, resume, overwrite, accept_changes, overrides)
        together(lambda: begin(*taken) if world.leads else None, world)
        warn_of_shadows(recipe, overrides)
        earlier: dict[str, RunFolder] = {}
        for index, (phase, plan) in enumerate(recipe.plans(), start=1):
            part = folder.phase(index, phase.name)
            if world.told(is_done(plan, part)):
                LOGGER.info("phase %d, %s: done already", index, phase.name)
                if accept_changes:
                    LOGGER.warning("Changed settings do not reach what is done: %s.", phase.name)
            else:
                LOGGER.info("phase %d of %d: %s", index, len(recipe.phases), phase.name)
                origin = Origin(phase.start or "fresh", earlier, phased=True)
                train(plan, part, resume=True, origin=origin, **told)
                if world.most(request.asked)[0] and index < len(recipe.phases):
                    raise Preempted(
                        f"The job was told to end and finished the phase {phase.name}; the same "
                        "command with --resume goes on from there."
                    )
            earlier = earlier | {phase.name: part}
        for line in notices.summary():
            LOGGER.info("%s", line)
        for name, part in earlier.items():
            LOGGER.info("phase %s: %s", name, part.export)
        last = list(earlier.values())[-1]
        together(lambda: deliver(last, folder) if world.leads else None, world)
        return folder.export


def deliver(last: RunFolder, folder: RunFolder) -> None:
    """Puts what the last phase delivers, and its verdict, where a run has them."""
    (folder.path / GATE).unlink(missing_ok=True)  # one of an earlier recipe
    if (last.path / GATE).exists():
        shutil.copyfile(last.path / GATE, folder.path / GATE)
    copy_export(last.export, folder.export)


def begin(
    folder: RunFolder,
    asked: dict[str, Any],
    recipe: PretrainRecipe,
    resume: bool,
    overwrite: bool,
    accept_changes: bool,
    overrides: Sequence[str],
) -> None:
    """Takes the folder for a run of several phases, or finds that it holds this one."""
    told = recipe.model_dump(mode="json")
    if resume and folder.holds_a_run:
        check_same_run(folder, asked, told, accept=accept_changes)
        return
    if resume:
        LOGGER.warning(NOTHING_TO_RESUME, folder.path)
    if overwrite:
        folder.empty()
    folder.begin(told, overrides, asked=asked)


def warn_of_shadows(recipe: PretrainRecipe, overrides: Sequence[str]) -> None:
    """Says which words of the command line every phase overrules."""
    for word in overrides:
        section, _, key = word.partition("=")[0].partition(".")
        settings = [getattr(phase, section, None) for phase in recipe.phases]
        if all(
            key in own if isinstance(own, dict) else own not in (None, "same") for own in settings
        ):
            LOGGER.warning(
                "%s changes nothing: every phase has a value of its own. Write phases.%s.%s.",
                word,
                recipe.phases[0].name,
                word,
            )


def is_done(recipe: PretrainRecipe, folder: RunFolder) -> bool:
    """Whether a phase has delivered everything: with several students, an export of each."""
    students = [] if recipe.distill is None else list(recipe.distill.students)
    names = students if len(students) > 1 else [""]
    return all((folder.export / name / CARD).is_file() for name in names)


def check_phases(recipe: PretrainRecipe, notices: Notices) -> None:
    """Refuses phases that do not fit together, before the first of them runs.

    All networks are built as the phases will build them, each from an untrained export of the
    phase before, so that nothing can differ between this check and the run.

    Raises:
        RecipeError: with the name of the phase and the reason.
    """
    earlier: dict[str, RunFolder] = {}
    before: tuple[PretrainRecipe, Learner] | None = None
    with TemporaryDirectory() as folder:
        for phase, plan in recipe.plans():
            part = RunFolder(Path(folder) / phase.name)
            try:
                refuse_unread(phase)
                learner = _rehearse(
                    plan, part, Origin(phase.start or "fresh", earlier), before, notices
                )
            except UnknownNameError as error:
                known = f" Earlier phases: {', '.join(earlier)}." if earlier else ""
                raise RecipeError(f"Phase {phase.name}: {error}{known}") from error
            except (RecipeError, ShapeError, WeightsError) as error:
                # The folders of this check are gone when the sentence is read.
                reason = str(error).replace(f"{folder}/", "")
                raise RecipeError(f"Phase {phase.name}: {reason}") from error
            earlier, before = earlier | {phase.name: part}, (plan, learner)


def refuse_unread_model(recipe: PretrainRecipe) -> None:
    """Refuses a network that is named where nothing but a distillation runs.

    Raises:
        RecipeError: with the setting.
    """
    plans = [plan for _, plan in recipe.plans()] or [recipe]
    if recipe.model != ModelRecipe() and all(plan.distill is not None for plan in plans):
        raise RecipeError(
            f"model is given ({recipe.model.source}), and a distillation reads distill.students "
            "instead. Leave model out, or name the network as a student."
        )


def refuse_unread(phase: PhaseRecipe) -> None:
    """Refuses settings of a phase that its start or its kind would leave unread.

    Raises:
        RecipeError: with the setting.
    """
    if phase.distill is not None and phase.model:
        raise RecipeError(
            "model is given, and a distillation reads distill.students instead. Leave model out."
        )
    if phase.start == "fresh":
        return
    if phase.distill is not None:
        raise RecipeError(
            f"start is {phase.start}, and a distillation starts its students from their own "
            "source. Leave start out; the phase before is the teacher."
        )
    if unread := sorted({"source", "architecture", "checkpoint"} & phase.model.keys()):
        raise RecipeError(
            f"model.{unread[0]} is given, and start={phase.start} takes the network of the phase "
            "before. Leave one of them out."
        )


def _rehearse(
    plan: PretrainRecipe,
    folder: RunFolder,
    origin: Origin,
    before: tuple[PretrainRecipe, Learner] | None,
    notices: Notices,
) -> Learner:
    """Builds a phase's networks and exports them untrained."""
    if origin.start != "fresh":
        if origin.previous is None or before is None:
            raise RecipeError(
                f"it starts from the {origin.start} of the phase before, and there is none. Set "
                "start='fresh', and model.source to weights that exist."
            )
        if len(before[1].averages) > 1:
            raise RecipeError(
                f"the phase before made {len(before[1].averages)} students, so there is no one "
                "network to go on with. Distil one, or go on in a run of its own."
            )
    if origin.start == "state" and (plan.gate is not None or plan.monitor.patience):
        raise RecipeError(
            "it goes on with the last state of the phase before, which a gate or "
            "monitor.patience may have refused. Set start='teacher', or leave both out."
        )
    import_modules(plan.imports)
    device = torch.device("cpu")
    source = load_source(plan.data, notices=notices)
    intake = Intake(source, plan, notices)
    plan, _ = resolve(plan, len(intake.keys))
    metadata = read_guides(plan, source, intake, notices)
    learner, infos = make_learner(plan, intake, origin, device, notices, metadata=metadata)
    if origin.start == "state" and before is not None:
        try:
            held = before[1].state()
            learner.load_state({k: v for k, v in held.items() if k not in ("gram", "start")})
        except (KeyError, RuntimeError) as error:
            raise RecipeError(
                "its networks or heads are not those of the phase before, whose state it starts "
                "from. Keep model and heads as they were, or set start='teacher'."
            ) from error
    averages = {name: in_one_piece(found, None) for name, found in learner.averages.items()}
    heads = {name: learner.heads(name) for name in averages}
    export_averages(plan, learner, infos, folder.export, {"steps": 0}, averages, heads)
    for step in snapshot_steps(plan):
        snapshot = snapshot_folder(folder, step)
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(folder.export, target_is_directory=True)
    return learner

"""From a recipe to a run that is ready for its first step; every refusal happens here."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dino_adapters.backbones.lora import share_frozen
from dino_adapters.contracts import CheckpointError, RecipeError
from dino_adapters.data import ImageSource, load_source
from dino_adapters.data.metadata import Metadata, entangled, read_metadata
from dino_adapters.pretrain.announce import announce, say
from dino_adapters.pretrain.augment import MultiCrop
from dino_adapters.pretrain.build import make_learner, stem_parameters
from dino_adapters.pretrain.checkpoint import Progress, meta_of, newest_good
from dino_adapters.pretrain.feed import Feed
from dino_adapters.pretrain.guides import columns_of
from dino_adapters.pretrain.intake import Intake
from dino_adapters.pretrain.labelled import LabelledSet, labelled_set
from dino_adapters.pretrain.learner import Learner
from dino_adapters.pretrain.optim import parameter_groups
from dino_adapters.pretrain.origin import FRESH, Origin
from dino_adapters.pretrain.parallel import divide, shard_networks
from dino_adapters.pretrain.ranks import ALONE, ProcessGroup
from dino_adapters.pretrain.resolve import resolve
from dino_adapters.pretrain.resume import check_same_inputs, check_same_run, describe_inputs
from dino_adapters.pretrain.rows import is_before
from dino_adapters.pretrain.run import Known, Run
from dino_adapters.pretrain.tensorboard import check_installed
from dino_adapters.pretrain.together import together
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import ALONE as ALONE_WORLD
from dino_adapters.runtime.world import World, pick_device

LOGGER = logging.getLogger(__name__)
NOTHING_TO_RESUME = "%s holds no run to resume: starting with the first step."


def assemble(
    recipe: PretrainRecipe,
    folder: RunFolder,
    *,
    world: World = ALONE_WORLD,
    resume: bool,
    overwrite: bool = False,
    accept_changes: bool = False,
    overrides: Sequence[str] = (),
    notices: Notices | None = None,
    origin: Origin = FRESH,
) -> Run:
    """Builds data, networks, heads and optimiser, and restores the last checkpoint if asked to.

    Raises:
        RecipeError, DataError, WeightsError, ShapeError: something does not fit.
        RunFolderError: the folder holds a run, and neither `resume` nor `overwrite` is on.
        CheckpointError: the run in the folder was told, or fed, something else.
    """
    import_modules(recipe.imports)
    notices = Notices() if notices is None else notices
    going_on = resume and world.told(folder.holds_a_run)
    saved = newest_state(folder, world) if going_on else None
    settled = settle_precision(recipe, world, saved, earlier_state(origin, world))
    run = build_run(settled, world, origin, notices)
    asked = recipe.model_dump(mode="json")
    told = run.recipe.model_dump(mode="json") | {"precision": recipe.precision}
    if resume and not going_on and not origin.phased:
        LOGGER.warning(NOTHING_TO_RESUME, folder.path)

    def take_folder() -> None:
        if not world.leads:
            return
        if going_on:
            check_same_run(folder, asked, told, accept=accept_changes)
            return
        if overwrite:
            folder.empty()  # only now: everything that could be refused was accepted
        folder.begin(told, overrides, asked=asked)

    together(take_folder, world)
    start(run, saved, origin)
    if accept_changes and run.progress.ended:
        run.progress = replace(run.progress, ended=False)
    if going_on and world.leads:
        done = run.progress.step
        folder.keep_rows(lambda row: done > 0 and is_before(row, done))
    announce(run)
    return run


def build_run(recipe: PretrainRecipe, world: World, origin: Origin, notices: Notices) -> Run:
    """A run before its first step, which no folder knows of.

    Raises:
        RecipeError, DataError, WeightsError, ShapeError: something does not fit.
    """
    device = pick_device(recipe.device, world)
    source = load_source(recipe.data, notices=notices)
    intake = Intake(source, recipe, notices)
    recipe, reasons = resolve(recipe, len(intake.keys))
    say(reasons)
    check_division(recipe, world)
    metadata = read_guides(recipe, source, intake, notices)
    labelled = labelled_for(recipe, source, notices)
    if recipe.gate is not None and labelled is not None and metadata is not None:
        # Where the verdict's labels are among the guides' values, training must not see them.
        metadata = metadata.without(labelled.queries)
    ranks = ALONE if world.size == 1 else ProcessGroup()
    learner, infos = make_learner(recipe, intake, origin, device, notices, ranks, metadata)
    info = infos[""]
    templates: dict[str, nn.ModuleDict] = {}
    if recipe.parallel.sharding == "full" and world.grouped:
        templates = {name: deepcopy(networks).cpu() for name, networks in learner.averages.items()}
        shard_networks(learner, world)
    elif recipe.lora is not None:
        for name, networks in learner.averages.items():
            share_frozen(networks["backbone"], learner.students[name]["backbone"])
    feed = Feed(
        intake.keys,
        intake.decoder(info),
        side=intake.side,
        batch_size=recipe.optim.batch_size,
        seed=recipe.seed,
        workers=recipe.data.workers,
        memory_gb=recipe.data.memory_gb,
        max_unreadable=recipe.data.max_unreadable,
        notices=notices,
        share=divide(recipe.optim.batch_size, world),
    )
    if intake.size_note:
        LOGGER.log(logging.WARNING if intake.shrunk else logging.INFO, "%s", intake.size_note)
    return Run(
        recipe,
        learner,
        infos,
        make_optimizer(learner, recipe),
        source,
        feed,
        MultiCrop(recipe.crops, info),
        Progress(0, 0.0),
        notices,
        describe_inputs(intake, info, source.groups, metadata) | {"precision": recipe.precision},
        world,
        Known.about(intake.keys, source.groups, metadata),
        trained=[
            parameter
            for networks in learner.students.values()
            for parameter in networks.parameters()
            if parameter.requires_grad
        ],
        labelled=labelled,
        stem=stem_parameters(learner, infos),
        templates=templates,
    )


def start(run: Run, saved: Path | None, origin: Origin) -> None:
    """Restores the run's own state, or takes over that of the phase before."""
    if saved is not None:
        meta = meta_of(saved)
        check_same_inputs(saved, meta.inputs, run.inputs)
        run.restore(saved)
        run.progress = meta.progress
    elif origin.start == "state" and (before := earlier_state(origin, run.world)) is not None:
        # Also after an interruption before the first checkpoint of this phase.
        run.restore(before, without=("gram/", "start/"))
        run.learner.remember_start()


def labelled_for(
    recipe: PretrainRecipe, source: ImageSource, notices: Notices
) -> LabelledSet | None:
    """What a run is watched and judged on; and whether what it is watched with is installed.

    Raises:
        MissingLibraryError: TensorBoard was asked for and is absent.
        DataError: labels are absent or do not fit the images.
    """
    if recipe.monitor.tensorboard:
        check_installed()
    if not recipe.monitor.every and recipe.gate is None:
        return None
    return labelled_set(recipe, source, notices)


def check_division(recipe: PretrainRecipe, world: World) -> None:
    """Refuses batches that do not divide over the processes.

    Raises:
        RecipeError: with the nearest batch sizes.
    """
    batch = recipe.optim.batch_size
    if batch % world.size:
        below = max(batch // world.size, 1) * world.size
        raise RecipeError(
            f"optim.batch_size is {batch}, which {world.size} processes cannot share evenly. Take "
            f"{below} or {below + world.size}."
        )
    gram, micro = recipe.gram, recipe.parallel.micro_batch
    divided = world.size > 1 or (micro is not None and micro < batch)
    if gram is not None and divided and (gram.level == "batch" or gram.tokens != "all"):
        raise RecipeError(
            "The batch is divided over micro-batches or devices, and gram compares patches across "
            "all of it. Set gram.level=image and gram.tokens=all, or do not divide it."
        )


def read_guides(
    recipe: PretrainRecipe, source: ImageSource, intake: Intake, notices: Notices
) -> Metadata | None:
    """The columns that guides need.

    Raises:
        RecipeError: there are guides and no table, or the other way round.
        DataError: the table does not suit them.
    """
    if bool(recipe.guides) != (recipe.data.metadata is not None):
        one, other = ("guides", "data.metadata") if recipe.guides else ("data.metadata", "guides")
        raise RecipeError(f"{one} is given without {other}. Give both, or leave it out.")
    if recipe.data.metadata is None:
        return None
    metadata = read_metadata(
        recipe.data.metadata,
        source.root,
        intake.keys,
        columns_of(recipe.guides),
        notices=notices,
    )
    for sentence in entangled(metadata, {g.column: g.effect for g in recipe.guides}):
        LOGGER.warning("%s", sentence)
    return metadata


def settle_precision(
    recipe: PretrainRecipe, world: World, saved: Path | None, earlier: Path | None
) -> PretrainRecipe:
    """The recipe with `precision=auto` settled: by the device, or as the last state was made."""
    if recipe.precision != "auto":
        return recipe
    device = pick_device(recipe.device, world)
    settled = "bf16" if device.type == "cuda" else "fp32"
    known = saved or earlier
    if known and (before := meta_of(known).inputs["precision"]) != settled:
        LOGGER.warning("precision stays %s, as this run began on another device.", before)
        settled = before
    return recipe.model_copy(update={"precision": settled})


def newest_state(folder: RunFolder, world: World) -> Path | None:
    """The newest good state of a run, None before the first; damaged ones are passed over.

    Raises:
        CheckpointError: there are states, and none of them is good.
    """
    saved, passed = newest_good(folder.checkpoints, world)
    if saved is None and passed:
        raise CheckpointError(
            f"None of the {len(passed)} states in {folder.checkpoints} can be used. {passed[0]} "
            "Bring a good one back, or remove that folder to start with the first step."
        )
    for sentence in passed:
        LOGGER.warning("%s", sentence)
    return saved


def earlier_state(origin: Origin, world: World) -> Path | None:
    """The last good state of the phase before."""
    return None if origin.previous is None else newest_state(origin.previous, world)


def make_optimizer(learner: Learner, recipe: PretrainRecipe) -> torch.optim.Optimizer:
    """AdamW over all students."""
    groups = [
        group
        for networks in learner.students.values()
        for group in parameter_groups(
            dict(networks.items()),
            layer_decay=recipe.optim.layer_decay,
            patch_embed=recipe.optim.patch_embed_multiplier,
            decay_rule=recipe.optim.decay_rule,
        )
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas)


def import_modules(names: Sequence[str]) -> None:
    """Imports modules of the user, so that their networks and readers are registered.

    Raises:
        RecipeError: there is no such module.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"The recipe imports '{name}', and there is no module '{error.name}'. Install it, "
                "or set PYTHONPATH to its folder."
            ) from error

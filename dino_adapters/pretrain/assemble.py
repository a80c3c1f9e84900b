"""From a recipe to a run that is ready for its first step; every refusal happens here."""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.backbones import ConvNeXt, VisionTransformer
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.contracts import BackboneInfo, RecipeError
from dino_adapters.data import load_source
from dino_adapters.pretrain.augment import Crops, MultiCrop
from dino_adapters.pretrain.build import make_learner
from dino_adapters.pretrain.checkpoint import (
    Progress,
    checkpoints,
    fed,
    load_checkpoint,
    take_over,
)
from dino_adapters.pretrain.delivery import export_averages, method_of
from dino_adapters.pretrain.feed import Feed
from dino_adapters.pretrain.intake import Intake
from dino_adapters.pretrain.learner import Learner
from dino_adapters.pretrain.masks import block_masks, reference_block_limit
from dino_adapters.pretrain.optim import parameter_groups
from dino_adapters.pretrain.origin import FRESH, Origin
from dino_adapters.pretrain.resume import check_same_inputs, check_same_run, describe_inputs
from dino_adapters.pretrain.sizes import sizes_at, snapshot_steps
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import derive, generator
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import pick_device

LOGGER = logging.getLogger(__name__)
NOTHING_TO_RESUME = "%s holds no run to resume: starting with the first step."


@dataclass
class Run:
    """Everything that the loop moves."""

    recipe: PretrainRecipe
    learner: Learner
    infos: dict[str, BackboneInfo]
    optimizer: torch.optim.Optimizer
    feed: Feed
    views: MultiCrop
    progress: Progress
    notices: Notices
    inputs: dict[str, Any]

    @property
    def patch_size(self) -> int:
        """The coarsest patch of all networks, which crop sizes refer to."""
        return max(info.patch_size for info in self.infos.values())

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The steps still to do, each with its images `(B, C, S, S)` in 0..1."""
        first = self.progress.step
        return enumerate(self.feed.batches(first, self.recipe.steps), start=first)

    def crops(self, step: int, images: Tensor) -> Crops:
        """Views and masks of a step, on the device."""
        seed, gram = self.recipe.seed, self.recipe.gram
        images = images.to(self.learner.device, non_blocking=True)
        sizes = sizes_at(step, self.recipe)
        global_crops, local_crops, gram_crops = self.views(
            images,
            generator(seed, "views", step),
            sizes,
            distort_gram=gram is not None and gram.distort,
        )
        masks = None
        if self.learner.with_ibot:
            told = self.recipe.masks
            side = sizes.global_size // self.patch_size
            reference = reference_block_limit(sizes.global_size, self.patch_size)
            masks = block_masks(
                len(global_crops),
                (side, side),
                random.Random(derive(seed, "masks", step)),
                probability=told.probability,
                ratio=told.ratio,
                most=reference if told.block_limit == "reference" else None,
                bins=told.bins,
                shift=told.shift,
            ).to(self.learner.device)
        return Crops(global_crops, local_crops, masks, len(images), gram_crops)

    def seed_draws(self, step: int) -> None:
        """Ties the networks' own draws (drop path, rotary coordinates) to the step."""
        for name, networks in self.learner.students.items():
            backbone = networks["backbone"]
            if isinstance(backbone, VisionTransformer | ConvNeXt):
                purpose = f"network/{name}" if name else "network"
                backbone.set_draws(RandomDraws(generator(self.recipe.seed, purpose, step)))

    def modules(self) -> dict[str, nn.Module]:
        """Everything that is trained: backbone and heads of each student, by name."""
        return {
            f"{name}/{part}" if name else part: module
            for name, networks in self.learner.students.items()
            for part, module in networks.items()
        }

    @property
    def snapshot_steps(self) -> frozenset[int]:
        """After which steps the moving average is exported; the last step has its export anyway."""
        return snapshot_steps(self.recipe)

    def export(self, folder: Path, step: int, seconds: float) -> Path:
        """Writes the moving averages, backbone and heads."""
        said = {"images": len(self.feed.keys), "steps": step, "seconds": round(seconds, 1)}
        said["images_seen"] = step * self.recipe.optim.batch_size
        return export_averages(self.recipe, self.learner, self.infos, folder, said)


def assemble(
    recipe: PretrainRecipe,
    folder: RunFolder,
    *,
    resume: bool,
    overwrite: bool = False,
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
    told = recipe.model_dump(mode="json")
    device = pick_device(recipe.device)
    going_on = resume and folder.holds_a_run
    saved = checkpoints(folder.checkpoints) if going_on else []
    recipe = settle_precision(recipe, device, saved or earlier_states(origin))
    notices = Notices() if notices is None else notices
    intake = Intake(load_source(recipe.data, notices=notices), recipe, notices)
    learner, infos = make_learner(recipe, intake, origin, device, notices)
    info = infos[""]
    inputs = describe_inputs(intake, info) | {"precision": recipe.precision}
    if resume and not going_on and not origin.phased:
        LOGGER.warning(NOTHING_TO_RESUME, folder.path)
    if going_on:
        check_same_run(folder, told)
    else:
        if overwrite:
            folder.empty()  # only now: everything that could be refused was accepted
        folder.begin(told, overrides)

    progress = Progress(0, 0.0)
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
    )
    views = MultiCrop(recipe.crops, info)
    optimizer = make_optimizer(learner, recipe)
    run = Run(recipe, learner, infos, optimizer, feed, views, progress, notices, inputs)
    if saved:
        check_same_inputs(saved[-1], fed(saved[-1]), inputs)
        run.progress = load_checkpoint(saved[-1], learner, run.optimizer)
    elif origin.start == "state" and origin.previous is not None:
        # Also after an interruption before the first checkpoint of this phase.
        take_over(learner, run.optimizer, checkpoints(origin.previous.checkpoints)[-1])
    if going_on:
        folder.drop_rows_from(run.progress.step)
    if intake.size_note:
        LOGGER.info("%s", intake.size_note)
    announce(run)
    return run


def settle_precision(
    recipe: PretrainRecipe, device: torch.device, saved: Sequence[Path]
) -> PretrainRecipe:
    """The recipe with `precision=auto` settled: by the device, or as the last state was made."""
    if recipe.precision != "auto":
        return recipe
    settled = "bf16" if device.type == "cuda" else "fp32"
    if saved and (before := fed(saved[-1])["precision"]) != settled:
        LOGGER.warning("precision stays %s, as this run began on another device.", before)
        settled = before
    return recipe.model_copy(update={"precision": settled})


def earlier_states(origin: Origin) -> list[Path]:
    """Saved states of the phase before."""
    return [] if origin.previous is None else checkpoints(origin.previous.checkpoints)


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


def announce(run: Run) -> None:
    """Says what was resolved, before the first step."""
    recipe, count = run.recipe, len(run.feed.keys)
    name = run.infos[""].name
    if recipe.objective.ibot_weight > 0 and not run.learner.with_ibot and not recipe.distill:
        LOGGER.warning("%s has no mask token, so it trains without iBOT.", name)
    if run.progress.step:
        LOGGER.info("going on from step %d of %d", run.progress.step, recipe.steps)
    if recipe.distill is None:
        start = run.infos[""].training
        known = "random weights" if start.get("weights") == "random" else "trained weights"
        LOGGER.info("%s starts from %s", name, known)
    else:
        for student, info in run.infos.items():
            if student:
                LOGGER.info(
                    "student %s: %s, %d wide; teacher %s", student, info.name, info.embed_dim, name
                )
    LOGGER.info(
        "%d images, %s, %s on %s: %d steps of %d images (%.1f passes), K = %d",
        count,
        name,
        method_of(recipe, run.learner),
        run.learner.device,
        recipe.steps,
        recipe.optim.batch_size,
        recipe.steps * recipe.optim.batch_size / count,
        recipe.objective.prototypes,
    )

"""From a recipe to a run that is ready for its first step; every refusal happens here."""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.backbones import (
    ConvNeXt,
    VisionTransformer,
    build_network,
    export_backbone,
)
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.contracts import BackboneInfo, RecipeError
from dino_adapters.data import load_source
from dino_adapters.pretrain.augment import Crops, MultiCrop
from dino_adapters.pretrain.checkpoint import Progress, checkpoints, fed, load_checkpoint
from dino_adapters.pretrain.feed import Feed
from dino_adapters.pretrain.intake import Intake
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.masks import block_masks
from dino_adapters.pretrain.optim import parameter_groups
from dino_adapters.pretrain.resume import check_same_inputs, check_same_run, describe_inputs
from dino_adapters.recipes.pretrain import ModelRecipe, PretrainRecipe
from dino_adapters.runtime.chance import derive, generator
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import pick_device

LOGGER = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that the loop moves."""

    recipe: PretrainRecipe
    learner: SelfDistillation
    optimizer: torch.optim.Optimizer
    feed: Feed
    views: MultiCrop
    info: BackboneInfo
    progress: Progress
    notices: Notices
    inputs: dict[str, Any]

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The steps still to do, each with its images `(B, C, S, S)` in 0..1."""
        first = self.progress.step
        return enumerate(self.feed.batches(first, self.recipe.steps), start=first)

    def crops(self, step: int, images: Tensor) -> Crops:
        """Views and masks of a step, on the device."""
        seed = self.recipe.seed
        images = images.to(self.learner.device, non_blocking=True)
        global_crops, local_crops = self.views(images, generator(seed, "views", step))
        masks = None
        if self.learner.with_ibot:
            side = self.recipe.crops.global_size // self.info.patch_size
            masks = block_masks(
                len(global_crops),
                (side, side),
                random.Random(derive(seed, "masks", step)),
                probability=self.recipe.masks.probability,
                ratio=self.recipe.masks.ratio,
            ).to(self.learner.device)
        return Crops(global_crops, local_crops, masks, len(images))

    def seed_draws(self, step: int) -> None:
        """Ties the network's own draws (drop path, rotary coordinates) to the step."""
        backbone = self.learner.student["backbone"]
        if isinstance(backbone, VisionTransformer | ConvNeXt):
            backbone.set_draws(RandomDraws(generator(self.recipe.seed, "network", step)))

    @property
    def snapshot_steps(self) -> frozenset[int]:
        """After which steps the teacher is exported; the last step has its export anyway."""
        count = self.recipe.checkpoint.snapshots
        return frozenset(round(self.recipe.steps * (i + 1) / (count + 1)) for i in range(count))

    def export(self, folder: Path, step: int, seconds: float) -> Path:
        """Writes the teacher's backbone."""
        training: dict[str, Any] = {
            "method": "DINO" + (" + iBOT" if self.learner.with_ibot else "") + " + KoLeo",
            "start": self.recipe.model.source,
            "started_from": dict(self.info.training),
            "images": len(self.feed.keys),
            "steps": step,
            "images_seen": step * self.recipe.optim.batch_size,
            "seconds": round(seconds, 1),
            "recipe": self.recipe.model_dump(
                mode="json", exclude={"data": {"source", "labels"}, "split": True}
            ),
        }
        info = replace(
            self.info,
            size=self.recipe.crops.global_size,
            training=training,
            untrained_bands=() if step else self.info.untrained_bands,
        )
        return export_backbone(self.learner.teacher["backbone"], info, folder, overwrite=True)


def assemble(
    recipe: PretrainRecipe,
    folder: RunFolder,
    *,
    resume: bool,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    notices: Notices | None = None,
) -> Run:
    """Builds data, network, heads and optimiser, and restores the last checkpoint if asked to.

    Raises:
        RecipeError, DataError, WeightsError, ShapeError: something does not fit.
        RunFolderError: the folder holds a run, and neither `resume` nor `overwrite` is on.
        CheckpointError: the run in the folder was told, or fed, something else.
    """
    import_modules(recipe.imports)
    device = pick_device(recipe.device)
    notices = Notices() if notices is None else notices
    intake = Intake(load_source(recipe.data, notices=notices), recipe, notices)
    network, info = make_network(recipe, intake, notices)

    inputs = describe_inputs(intake, info)

    told = recipe.model_dump(mode="json")
    going_on = resume and folder.holds_a_run
    if resume and not going_on:
        LOGGER.warning("%s holds no run to resume: starting with the first step.", folder.path)
    if going_on:
        check_same_run(folder, told)
    else:
        if overwrite:
            folder.empty()  # only now: everything that could be refused was accepted
        folder.begin(told, overrides)

    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    learner = SelfDistillation(
        network, recipe.objective, seed=recipe.seed, device=device, bf16=bf16
    )
    groups = parameter_groups(
        dict(learner.student.items()),
        layer_decay=recipe.optim.layer_decay,
        patch_embed=recipe.optim.patch_embed_multiplier,
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas)
    progress = Progress(0, 0.0)
    if going_on:
        if saved := checkpoints(folder.checkpoints):
            check_same_inputs(saved[-1], fed(saved[-1]), inputs)
            progress = load_checkpoint(saved[-1], learner, optimizer)
        folder.drop_rows_from(progress.step)
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
    run = Run(recipe, learner, optimizer, feed, views, info, progress, notices, inputs)
    announce(run)
    return run


def make_network(
    recipe: PretrainRecipe, intake: Intake, notices: Notices
) -> tuple[nn.Module, BackboneInfo]:
    """The student's network for the bands of the images.

    Raises:
        RecipeError, WeightsError, ShapeError: it cannot be had, or does not take the crops.
    """
    model = recipe.model
    network, info = build_network(
        model.source,
        bands=intake.bands,
        architecture=model.architecture or None,
        checkpoint=Path(model.checkpoint) if model.checkpoint else None,
        drop_path=model.drop_path,
        mean=intake.mean,
        std=intake.std,
        seed=derive(recipe.seed, "network"),
        notices=notices,
    )
    if not isinstance(network, VisionTransformer | ConvNeXt):
        refuse_drops(model, info.name)
    # In this layout convolutions run 1.6 times as fast (EfficientNet-Lite0, 96 px, 2 CPU cores).
    network = network.to(memory_format=torch.channels_last)
    check_crops(network, info, recipe)
    return network, info


def refuse_drops(model: ModelRecipe, name: str) -> None:
    """Networks of timm draw from the global generator, so their drops could not be repeated.

    Raises:
        RecipeError: drop path or dropout is on.
    """
    asked = {"model.drop_path": model.drop_path}
    asked |= {f"model.architecture.{k}": v for k, v in model.architecture.items() if "drop" in k}
    for key, value in asked.items():
        if value:
            raise RecipeError(
                f"{key} is {value}, but {name} is not one of our networks, whose drops can be "
                "repeated after a resume. Set it to 0."
            )


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
    if recipe.objective.ibot_weight > 0 and not run.learner.with_ibot:
        LOGGER.warning(
            "%s has no mask token, so it trains with DINO and KoLeo, without iBOT.", run.info.name
        )
    if run.progress.step:
        LOGGER.info("going on from step %d of %d", run.progress.step, recipe.steps)
    LOGGER.info(
        "%d images, %s: %d steps of %d images (%.1f passes), K = %d",
        count,
        run.info.name,
        recipe.steps,
        recipe.optim.batch_size,
        recipe.steps * recipe.optim.batch_size / count,
        recipe.objective.prototypes,
    )


def check_crops(network: nn.Module, info: BackboneInfo, recipe: PretrainRecipe) -> None:
    """Sends an empty crop of each size through the network, so that a misfit shows now.

    Raises:
        ShapeError: the network refuses a crop size.
    """
    sizes = {recipe.crops.global_size}
    if recipe.crops.local_count:
        sizes.add(recipe.crops.local_size)
    network.eval()
    with torch.no_grad():
        for size in sorted(sizes):
            network(torch.zeros(1, len(info.bands), size, size))
    network.train()

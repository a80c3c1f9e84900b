"""A run: everything that the loop moves."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.backbones import ConvNeXt, VisionTransformer
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.contracts import BackboneInfo, DiskFullError
from dino_adapters.data import ImageSource
from dino_adapters.data.metadata import Metadata
from dino_adapters.pretrain import checkpoint
from dino_adapters.pretrain.augment import Crops, MultiCrop
from dino_adapters.pretrain.checkpoint import Progress
from dino_adapters.pretrain.delivery import export_averages
from dino_adapters.pretrain.dice import Dice
from dino_adapters.pretrain.feed import Batch, Feed
from dino_adapters.pretrain.flat_state import (
    blank_optimizer,
    flatten,
    flatten_optimizer,
    restore_optimizer,
    unflatten,
)
from dino_adapters.pretrain.guides import targets_of
from dino_adapters.pretrain.kin import kin_of
from dino_adapters.pretrain.labelled import LabelledSet
from dino_adapters.pretrain.learner import Learner
from dino_adapters.pretrain.masks import block_masks, reference_block_limit
from dino_adapters.pretrain.parallel import gathered, in_one_piece
from dino_adapters.pretrain.sizes import sizes_at, snapshot_steps
from dino_adapters.pretrain.together import together
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import derive, generator
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.world import World

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """What is known of the images besides their pixels.

    Attributes:
        families: a number for each key, the same for all of one group.
        metadata: the guides' columns, or None without guides.
    """

    families: Mapping[str, int]
    metadata: Metadata | None = None

    @classmethod
    def about(
        cls, keys: Sequence[str], groups: Mapping[str, str], metadata: Metadata | None
    ) -> Known:
        """Numbers groups, and keys without one, in their order."""
        # A group and a key of the same name are two.
        names = {key: ("group", groups[key]) if key in groups else ("key", key) for key in keys}
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()))}
        return cls({key: numbers[name] for key, name in names.items()}, metadata)

    def targets(self, keys: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """What the guides know of these images, `(B,)` each."""
        if self.metadata is None:
            return {}
        return targets_of(self.metadata, [self._places[key] for key in keys], device)

    @cached_property
    def _places(self) -> dict[str, int]:
        assert self.metadata is not None
        return {key: place for place, key in enumerate(self.metadata.keys)}


@dataclass
class Run:
    """Everything that the loop moves.

    Attributes:
        recipe: with everything settled.
        learner: the method with its networks.
        infos: cards of the networks; the one under the empty name is what images are prepared for.
        optimizer: AdamW over all students.
        source: the images.
        feed: this process's share of every batch.
        views: makes crops.
        progress: how far it is.
        notices: what was skipped, converted or assumed.
        inputs: what it is fed, for the refusal to go on with other images.
        world: the processes.
        known: groups and metadata.
        trained: parameters that learn once the backbone is not frozen.
        labelled: what it is watched and judged on, where anything is labelled and watched.
        stem: those among them that learn while it is.
        templates: undivided averages by student, where the networks are divided over devices.
    """

    recipe: PretrainRecipe
    learner: Learner
    infos: dict[str, BackboneInfo]
    optimizer: torch.optim.Optimizer
    source: ImageSource
    feed: Feed
    views: MultiCrop
    progress: Progress
    notices: Notices
    inputs: dict[str, Any]
    world: World
    known: Known
    trained: list[nn.Parameter]
    labelled: LabelledSet | None = None
    stem: list[nn.Parameter] = field(default_factory=list)
    templates: dict[str, nn.ModuleDict] = field(default_factory=dict)
    _frozen: bool = False

    @property
    def patch_size(self) -> int:
        """The coarsest patch of all networks, which crop sizes refer to."""
        return max(info.patch_size for info in self.infos.values())

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """The steps still to do, each with its images."""
        first = self.progress.step
        return enumerate(self.feed.batches(first, self.recipe.steps), start=first)

    def crops(self, step: int, batch: Batch) -> Crops:
        """Views and masks of a step, on the device.

        All draws are made for the whole batch, so that they do not depend on how it is divided.
        """
        seed, gram, total = self.recipe.seed, self.recipe.gram, self.recipe.optim.batch_size
        images = batch.images.to(self.learner.device, non_blocking=True)
        first = self.world.rank * len(images) if len(images) < total else 0
        sizes = sizes_at(step, self.recipe)
        global_crops, local_crops, gram_crops = self.views(
            images,
            Dice(generator(seed, "views", step), total, first, len(images)),
            sizes,
            distort_gram=gram is not None and gram.distort,
        )
        masks = None
        if self.learner.with_ibot:
            views = len(global_crops) // len(images)
            masks = self._masks(step, views * total, sizes.global_size)
            masks = masks.unflatten(0, (views, total))[:, first : first + len(images)]
            masks = masks.flatten(0, 1).to(self.learner.device)
        kin = None
        if self.recipe.objective.regularizer == "koleo":
            families = torch.tensor([self.known.families[key] for key in batch.keys])
            device = self.learner.device
            kin = kin_of(batch.looks.to(device), families.to(device), self.learner.ranks)
        targets = self.known.targets(batch.keys, self.learner.device)
        return Crops(
            global_crops, local_crops, masks, len(images), gram_crops, kin=kin, targets=targets
        )

    def _masks(self, step: int, count: int, size: int) -> Tensor:
        told, side = self.recipe.masks, size // self.patch_size
        reference = reference_block_limit(size, self.patch_size)
        return block_masks(
            count,
            (side, side),
            random.Random(derive(self.recipe.seed, "masks", step)),
            probability=told.probability,
            ratio=told.ratio,
            most=reference if told.block_limit == "reference" else None,
            bins=told.bins,
            shift=told.shift,
        )

    def seed_draws(self, step: int, part: int = 0) -> None:
        """Ties the networks' own draws (drop path, rotary coordinates) to step and micro-batch."""
        micro = self.recipe.parallel.micro_batch or self.recipe.optim.batch_size
        each = -(-len(self.feed.share) // micro)
        number = self.world.rank * each + part
        for name, networks in self.learner.students.items():
            backbone = networks["backbone"]
            if isinstance(backbone, VisionTransformer | ConvNeXt):
                purpose = f"network/{name}" if name else "network"
                numbers = (step, number) if number else (step,)
                backbone.set_draws(RandomDraws(generator(self.recipe.seed, purpose, *numbers)))

    def freeze(self, *, frozen: bool) -> None:
        """Takes the backbones out of training, or back in.

        A frozen backbone asks for no gradient, so nothing is computed backwards through it; but
        where a stem learns new bands, gradients have to pass.
        """
        if frozen == self._frozen:
            return
        backbones = [networks["backbone"] for networks in self.learner.students.values()]
        inside = {id(p) for backbone in backbones for p in backbone.parameters()}
        stay = {id(p) for p in self.stem}
        for parameter in self.trained:
            if id(parameter) in inside and id(parameter) not in stay:
                parameter.requires_grad_(not frozen)
        self._frozen = frozen

    def modules(self) -> dict[str, nn.Module]:
        """Everything that is trained: backbone and heads of each student, by name."""
        return {
            f"{name}/{part}" if name else part: module
            for name, networks in self.learner.students.items()
            for part, module in networks.items()
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of all students by a name of their own."""
        for name, module in self.modules().items():
            for key, parameter in module.named_parameters():
                yield f"{name}.{key}", parameter

    @property
    def snapshot_steps(self) -> frozenset[int]:
        """After which steps the moving average is exported; the last step has its export anyway."""
        return snapshot_steps(self.recipe)

    def delivered(self) -> dict[str, nn.ModuleDict]:
        """The moving averages as they are delivered: in one piece, adapters merged.

        Every process must ask.
        """
        return {
            name: in_one_piece(networks, self.templates.get(name))
            for name, networks in self.learner.averages.items()
        }

    def export(self, folder: Path) -> Path:
        """Writes the moving averages, backbone and heads; the first process does."""
        said: dict[str, Any] = {"images": len(self.feed.keys), "steps": self.progress.step}
        said["seconds"] = round(self.progress.seconds, 1)
        said["images_seen"] = self.progress.step * self.recipe.optim.batch_size
        averages = self.delivered()
        heads = {name: gathered(self.learner.heads(name)) for name in averages}
        told = (self.recipe, self.learner, self.infos, folder, said, averages, heads)
        together(lambda: export_averages(*told) if self.world.leads else None, self.world)
        return folder

    def state(self) -> tuple[dict[str, Tensor], checkpoint.Meta]:
        """All tensors by name, and what is none."""
        tensors, numbers = flatten(self.learner.state())
        moments = flatten_optimizer(self.optimizer, self.named_parameters())
        return tensors | moments, checkpoint.Meta(self.progress, self.inputs, numbers)

    def save(self, folder: Path, *, keep: int | None = None, last_chance: bool = False) -> None:
        """Saves the state of the step that is done, and keeps the last few.

        A full disk leaves the earlier states as they were; training goes on with a warning, as
        there may be room the next time.

        Args:
            folder: of the states.
            keep: how many stay; None is as the recipe says.
            last_chance: raise where there is no room.

        Raises:
            DiskFullError: there is no room, and this was the last chance.
        """
        tensors, meta = self.state()
        keep = keep or self.recipe.checkpoint.keep
        try:
            checkpoint.save(folder, tensors, meta, keep=keep, world=self.world)
        except DiskFullError as error:
            if last_chance:
                raise
            LOGGER.warning("The state of step %d was not saved. %s", self.progress.step, error)
            self.notices.add("a state was not saved", str(error))

    def restore(self, path: Path, *, without: tuple[str, ...] = ()) -> checkpoint.Meta:
        """Takes over networks, averages and moments of a saved state, in place.

        Args:
            path: of the state.
            without: beginnings of names that are left as they are.

        Returns:
            What is saved beside them; the run's progress is not touched.

        Raises:
            CheckpointError: it is damaged, or of a run with other networks.
        """
        device = self.learner.device
        meta = checkpoint.meta_of(path)
        tensors, _ = flatten(self.learner.state())
        # Centres come with the first step.
        tensors |= checkpoint.blank(path, "centers/", device)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(without)}
        moments = blank_optimizer(path, self.named_parameters())
        checkpoint.load(path, tensors | moments, self.world, without=without)
        self.learner.load_state(unflatten(tensors, meta.numbers))
        restore_optimizer(self.optimizer, self.named_parameters(), moments)
        return meta

"""The networks and the method of a run, and whether its crops suit them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dino_adapters.backbones import ConvNeXt, VisionTransformer, add_lora, build_network
from dino_adapters.backbones.stem import stem_of
from dino_adapters.contracts import BackboneInfo, Network, RecipeError, ShapeError
from dino_adapters.data.metadata import Metadata
from dino_adapters.pretrain.anchor import first_refresh
from dino_adapters.pretrain.distill import Distillation
from dino_adapters.pretrain.guides import make_guides
from dino_adapters.pretrain.imitate import FeatureDistillation
from dino_adapters.pretrain.intake import Intake
from dino_adapters.pretrain.learner import Learner, SelfDistillation
from dino_adapters.pretrain.objective import Tensors, heads_of
from dino_adapters.pretrain.origin import (
    Origin,
    gram_network,
    has_heads,
    refuse_untrained,
    with_heads,
)
from dino_adapters.pretrain.ranks import ALONE, Ranks
from dino_adapters.pretrain.sizes import all_sizes
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.sections import ModelRecipe
from dino_adapters.recipes.teachers import DistillRecipe, StudentRecipe
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.console import Notices

LOGGER = logging.getLogger(__name__)


def make_learner(
    recipe: PretrainRecipe,
    intake: Intake,
    origin: Origin,
    device: torch.device,
    notices: Notices,
    ranks: Ranks = ALONE,
    metadata: Metadata | None = None,
) -> tuple[Learner, dict[str, BackboneInfo]]:
    """The method of a run with all its networks, and their cards.

    The card under the empty name is that of the network which images are prepared for: the
    student's, or in a distillation the teacher's; students follow by name.

    Raises:
        RecipeError, WeightsError, ShapeError: a network cannot be had, or does not fit the others.
    """
    bf16 = recipe.precision == "bf16"
    if recipe.distill is not None:
        refuse_for_distillation(recipe)
        told = {"seed": recipe.seed, "device": device, "bf16": bf16, "ranks": ranks}
        return _distillation(recipe, recipe.distill, intake, origin, notices, told)
    network, info = make_network(recipe, intake, origin, notices)
    guides = None
    if metadata is not None:
        width = cast(Network, network).embed_dim
        guides = make_guides(recipe.guides, metadata, width, seed=recipe.seed)
    learner = SelfDistillation(
        network,
        recipe.objective,
        seed=recipe.seed,
        device=device,
        bf16=bf16,
        gram=recipe.gram,
        gram_network=gram_network(recipe.gram, network, info, origin, notices),
        anchor=recipe.anchor,
        guides=guides,
        ranks=ranks,
    )
    if recipe.gram is not None and recipe.gram.tokens != "all" and not learner.with_ibot:
        raise RecipeError(
            f"gram.tokens is {recipe.gram.tokens}, and {info.name} trains without masks. Set "
            "gram.tokens=all."
        )
    if recipe.gram is not None and first_refresh(recipe.gram) > recipe.steps:
        LOGGER.warning(
            "The Gram teacher is never refreshed: it would be after %d steps, and there are %d. "
            "Lower gram.refresh_every or gram.first_refresh, if it should.",
            first_refresh(recipe.gram),
            recipe.steps,
        )
    previous = origin.previous
    if origin.start == "teacher" and previous is not None:
        export = str(previous.export)
        if has_heads(export):
            trained = with_heads(network, info, export, learner.objective)
            # The backbone is there already, perhaps with adapters.
            ready = heads_of(trained.networks)
            try:
                load_heads(learner.student, ready)
            except RuntimeError as error:
                raise RecipeError(
                    f"The heads in {export} are built otherwise than objective tells (hidden_dim, "
                    "bottleneck_dim, head_layers, shared_head or weight_norm). Set them as they "
                    "were when these heads were trained."
                ) from error
            load_heads(learner.teacher, ready)
            learner.balance.start(trained.centers, device)
        else:
            LOGGER.warning("The phase before left no heads: they start at random.")
    return learner, {"": info}


def make_network(
    recipe: PretrainRecipe, intake: Intake, origin: Origin, notices: Notices
) -> tuple[nn.Module, BackboneInfo]:
    """The student's network for the bands of the images.

    Raises:
        RecipeError, WeightsError, ShapeError: it cannot be had, or does not take the crops.
    """
    model, previous = recipe.model, origin.previous
    taken = None if origin.start == "fresh" or previous is None else str(previous.export)
    fresh = taken is None
    network, info = build_network(
        model.source if taken is None else taken,
        bands=intake.bands,
        architecture=(model.architecture or None) if fresh else None,
        checkpoint=Path(model.checkpoint) if model.checkpoint and fresh else None,
        drop_path=model.drop_path,
        mean=intake.mean if fresh else None,
        std=intake.std if fresh else None,
        seed=derive(recipe.seed, "network"),
        notices=notices,
    )
    if not isinstance(network, VisionTransformer | ConvNeXt):
        refuse_drops(model, info.name)
    # In this layout convolutions run 1.6 times as fast (EfficientNet-Lite0, 96 px, 2 CPU cores).
    network = network.to(memory_format=torch.channels_last)
    check_crops(network, info, recipe, coarsest=info.patch_size)
    if recipe.lora is not None:
        lora = recipe.lora
        summary = add_lora(
            network,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            open_blocks=lora.open_blocks,
            norms=lora.norms,
            seed=recipe.seed,
            open_stem=bool(info.untrained_bands),
        )
        LOGGER.info("%s.", summary.sentence())
    return network, info


def load_heads(networks: nn.ModuleDict, tensors: Tensors) -> None:
    """Puts heads, named `HEAD.NAME`, beside a backbone.

    Raises:
        RuntimeError: they are others, or built otherwise (by torch).
    """
    ours = {name: module for name, module in networks.items() if name.endswith("_head")}
    theirs = {key.split(".", 1)[0] for key in tensors}
    if ours.keys() != theirs:
        raise RuntimeError(f"heads {sorted(theirs)} for {sorted(ours)}")
    for name, module in ours.items():
        start = f"{name}."
        module.load_state_dict(
            {key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)}
        )


def stem_parameters(learner: Learner, infos: dict[str, BackboneInfo]) -> list[nn.Parameter]:
    """What learns while the backbone is frozen: the first layer, if it reads bands that are new."""
    if not infos[""].untrained_bands or "" not in learner.students:
        return []
    backbone = learner.students[""]["backbone"]
    return [p for p in stem_of(backbone).parameters() if p.requires_grad]


def refuse_for_distillation(recipe: PretrainRecipe) -> None:
    """Refuses what has no part in a distillation.

    Raises:
        RecipeError: with the section.
    """
    given = {"lora": recipe.lora, "anchor": recipe.anchor, "guides": recipe.guides or None}
    given["schedule.freeze_backbone"] = recipe.schedule.freeze_backbone or None
    given["gate"] = recipe.gate
    for name, value in given.items():
        if value is not None:
            raise RecipeError(
                f"{name} is given, and a distillation trains its students whole from their own "
                "start. Leave it out; lora=None and anchor=None turn these off in a phase."
            )


def _distillation(
    recipe: PretrainRecipe,
    distill: DistillRecipe,
    intake: Intake,
    origin: Origin,
    notices: Notices,
    told: dict[str, Any],
) -> tuple[Learner, dict[str, BackboneInfo]]:
    source = distill.teacher
    if source is None:
        if origin.previous is None:
            raise RecipeError(
                "The first phase is a distillation without a teacher. Set distill.teacher, or let "
                "another phase come before it."
            )
        source = list(origin.earlier)[-1]
    if source.startswith("give "):
        raise RecipeError("No teacher was named: add distill.teacher=FOLDER/export.")
    source = origin.find(source)
    teacher, info = build_network(source, bands=intake.bands, notices=notices)
    refuse_untrained("distill.teacher", source, info)
    by_heads = distill.by == "heads" or (distill.by == "auto" and has_heads(source))
    if by_heads and not has_heads(source):
        raise RecipeError(
            f"distill.by is heads, and {info.name} comes without any. Take an export of a run, or "
            "set distill.by=features."
        )
    if not by_heads and recipe.crops.local_count:
        raise RecipeError(
            f"The features of {info.name} are imitated view by view, and local "
            f"crops ({recipe.crops.local_count}) have no part in it. Set crops.local_count=0."
        )
    infos, backbones = {"": info}, {}
    for name, student in distill.students.items():
        backbones[name], infos[name] = _student(name, student, info, recipe.seed, notices)
    coarsest = max(card.patch_size for card in infos.values())
    for name, card in infos.items():
        check_crops(backbones.get(name, teacher), card, recipe, coarsest=coarsest)
    if not by_heads:
        LOGGER.warning(
            "The features of %s are imitated: settings of objective and masks are not used.",
            info.name,
        )
        return FeatureDistillation(teacher, backbones, **told), infos
    trained = with_heads(teacher, info, source, recipe.objective)
    learner = Distillation(trained.networks, backbones, recipe.objective, **told)
    learner.balance.start(trained.centers, learner.device)
    return learner, infos


def _student(
    name: str, student: StudentRecipe, teacher: BackboneInfo, seed: int, notices: Notices
) -> tuple[nn.Module, BackboneInfo]:
    network, info = build_network(
        student.source,
        bands=teacher.bands,
        architecture=student.architecture or None,
        drop_path=student.drop_path,
        mean=teacher.mean,
        std=teacher.std,
        seed=derive(seed, f"network/{name}"),
        notices=notices,
    )
    if not isinstance(network, VisionTransformer | ConvNeXt):
        refuse_drops(
            ModelRecipe(source=student.source, architecture=student.architecture), info.name
        )
    return network.to(memory_format=torch.channels_last), replace(info, name=info.name)


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


def fitting_crops(recipe: PretrainRecipe, patch: int) -> str:
    """The nearest sizes that are multiples of a patch, as words for a command line."""
    told = {} if recipe.crops.mixture else {"crops.global_size": recipe.crops.global_size}
    if recipe.crops.local_count and not recipe.crops.mixture:
        told["crops.local_size"] = recipe.crops.local_size
    if recipe.gram is not None and recipe.gram.size is not None:
        told["gram.size"] = recipe.gram.size
    words = [
        f"{name}={max(round(size / patch), 1) * patch}"
        for name, size in told.items()
        if size % patch
    ]
    return f"Take {' '.join(words)}." if words else f"Take multiples of {patch} px."


def check_crops(
    network: nn.Module, info: BackboneInfo, recipe: PretrainRecipe, *, coarsest: int
) -> None:
    """Sends an empty crop of each size through the network, so that a misfit shows now.

    Args:
        network: the network.
        info: its card.
        recipe: sizes of the crops.
        coarsest: the patch size that they refer to; finer networks get smaller crops.

    Raises:
        ShapeError: the network refuses a crop size, or makes another grid of it than the others.
    """
    own_kind = isinstance(network, VisionTransformer | ConvNeXt)
    sides = set()
    for sizes in all_sizes(recipe):
        sides.add(sizes.global_size)
        if recipe.crops.local_count:
            sides.add(sizes.local_size)
        if sizes.gram_size is not None:
            sides.add(sizes.gram_size)
    network.eval()
    with torch.no_grad():
        for side in sorted(sides):
            if side % coarsest and info.patch_size < coarsest:
                raise ShapeError(
                    f"A crop of {side} px is no multiple of {coarsest} px, the coarsest patch of "
                    f"these networks, so {info.name} cannot get the same grid. Make crop sizes "
                    f"multiples of {coarsest} px."
                )
            own = side * info.patch_size // coarsest
            if own_kind and side % coarsest:
                raise ShapeError(
                    f"A crop size of the recipe is {side} px, and {info.name} has patches of "
                    f"{info.patch_size} px. {fitting_crops(recipe, coarsest)}"
                )
            seen = cast(Network, network)(torch.zeros(1, len(info.bands), own, own))
            if seen.grid != (side // coarsest, side // coarsest):
                raise ShapeError(
                    f"{info.name} makes {seen.grid[0]} x {seen.grid[1]} patches of a crop of "
                    f"{own} px, and {side // coarsest} x {side // coarsest} were expected. Make "
                    f"crop sizes multiples of {coarsest} px."
                )
    network.train()

"""What a phase delivers: the moving averages, with what is known of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from dino_adapters.backbones import build_network, export_backbone
from dino_adapters.backbones.weights import DINOV3_LICENCE_ID
from dino_adapters.contracts import BackboneInfo
from dino_adapters.pretrain.imitate import FeatureDistillation
from dino_adapters.pretrain.learner import Learner
from dino_adapters.pretrain.objective import Tensors
from dino_adapters.pretrain.origin import HEADS
from dino_adapters.pretrain.sizes import largest_global
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.files import needs_room, replace_folder

REGULARIZERS = {"koleo": "KoLeo", "kde": "KDE", "sigreg": "SIGReg"}


def export_averages(
    recipe: PretrainRecipe,
    learner: Learner,
    infos: dict[str, BackboneInfo],
    folder: Path,
    said: dict[str, Any],
    averages: dict[str, nn.ModuleDict],
    heads: dict[str, Tensors],
) -> Path:
    """Writes each moving average, backbone and heads; several students get a folder each.

    Args:
        recipe: of the phase.
        learner: with the averages.
        infos: cards of the networks as they were at the start.
        folder: the export folder.
        said: numbers of the run for the card: `steps`, `images` and more.
        averages: as they are delivered, by student.
        heads: theirs.
    """
    coarsest = max(info.patch_size for info in infos.values())
    largest = largest_global(recipe)
    told = recipe.model_dump(mode="json", exclude={"data": {"source", "labels"}, "split": True})
    # As trained: a network without mask tokens has no iBOT, whatever the recipe says.
    objective = told["objective"] | ({} if learner.with_ibot else {"ibot_weight": 0.0})
    for name, networks in averages.items():
        info, distill = infos[name], recipe.distill
        training: dict[str, Any] = {
            "method": method_of(recipe, learner),
            "start": recipe.model.source if distill is None else distill.students[name].source,
            "started_from": dict(info.training),
            **said,
            "recipe": told | {"objective": objective},
        }
        licence = info.licence
        if distill is not None:
            teacher = infos[""]
            training["teacher"] = {
                "name": teacher.name,
                "licence": teacher.licence,
                "training": dict(teacher.training),
            }
            # What binds a teacher's weights may bind what was made from them.
            if licence == "none" or teacher.licence == DINOV3_LICENCE_ID:
                licence = teacher.licence
        now = replace(
            info,
            licence=licence,
            size=largest * info.patch_size // coarsest,
            training=training,
            untrained_bands=() if said.get("steps") else info.untrained_bands,
        )
        export_backbone(
            networks["backbone"],
            now,
            folder / name if len(averages) > 1 else folder,
            overwrite=True,
            beside={HEADS: heads[name]} if heads[name] else None,
        )
    return folder


def method_of(recipe: PretrainRecipe, learner: Learner) -> str:
    """The terms of the objective in words."""
    if isinstance(learner, FeatureDistillation):
        return "feature distillation"
    terms = ["DINO"]
    if learner.with_ibot:
        terms.append("iBOT")
    if recipe.objective.regularizer != "none" and recipe.objective.regularizer_weight > 0:
        terms.append(REGULARIZERS[recipe.objective.regularizer])
    if recipe.gram is not None:
        terms.append("Gram")
    return ("distillation: " if recipe.distill else "") + " + ".join(terms)


def copy_export(export: Path, target: Path) -> Path:
    """Copies an export to another folder; whole or not at all.

    Raises:
        DiskFullError: there is no room; what stood there is whole.
    """
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in export.rglob("*") if path.is_file())
    advice = "Make room, and go on with --resume: what is there is whole."
    try:
        with needs_room(f"The export {target}", target.parent, size, advice):
            for path in sorted(export.rglob("*")):
                if path.is_file():
                    place = partial / path.relative_to(export)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, place)
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def resize_export(export: Path, size: int) -> None:
    """Writes an export once more, with the size that it was found to be read best at."""
    network, info = build_network(export)
    if info.size == size:
        return
    heads = export / HEADS
    beside = {HEADS: load_file(heads)} if heads.is_file() else None
    export_backbone(network, replace(info, size=size), export, overwrite=True, beside=beside)

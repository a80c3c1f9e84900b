"""Where the networks of a phase come from: nothing, the phase before, its snapshots, or a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dino_adapters.backbones import build_network
from dino_adapters.backbones.card import exports_below
from dino_adapters.backbones.lora import merged
from dino_adapters.contracts import BackboneInfo, RecipeError, WeightsError
from dino_adapters.pretrain.objective import CENTER, Tensors, make_networks
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.recipes.teachers import GramRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder

HEADS = "heads.safetensors"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a phase starts from.

    Attributes:
        start: `fresh`, or what is taken over from the phase before: its `state`, or its `teacher`.
        earlier: folders of the phases before this one, by name, in order.
        phased: whether this is a phase of a longer run.
    """

    start: Literal["fresh", "state", "teacher"] = "fresh"
    earlier: Mapping[str, RunFolder] = field(default_factory=dict)
    phased: bool = False

    @property
    def previous(self) -> RunFolder | None:
        """The folder of the phase before."""
        return list(self.earlier.values())[-1] if self.earlier else None

    def find(self, word: str) -> str:
        """The export that `PHASE`, `PHASE/STUDENT` or `PHASE@STEP` names; other words as they are.

        Raises:
            RecipeError: that phase kept no snapshot of that step, or made several students.
        """
        name, _, step = word.partition("@")
        name, _, student = name.partition("/")
        if name not in self.earlier:
            return word
        folder = self.earlier[name]
        made = [path.name for path in exports_below(folder.export)]
        if made and student not in made:
            raise RecipeError(
                f"The phase {name} made {len(made)} students. Name one: "
                f"{' or '.join(f'{name}/{other}' for other in made)}."
            )
        if not step:
            return str(folder.export / student)
        found = snapshot_folder(folder, int(step) if step.isdecimal() else -1)
        if not found.is_dir():
            there = sorted(int(p.name.removeprefix("step_")) for p in found.parent.glob("step_*"))
            raise RecipeError(
                f"The phase {name} kept no snapshot of step {step}, only of {there}. Name one of "
                "them, or set checkpoint.snapshots of that phase."
            )
        return str(found / student)


FRESH = Origin()


def snapshot_folder(folder: RunFolder, step: int) -> Path:
    """Where the backbone of a step is exported on the way."""
    return folder.path / "snapshots" / f"step_{step:08d}"


def has_heads(export: str) -> bool:
    """Whether an export holds the heads that it was trained with."""
    return (Path(export) / HEADS).is_file()


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained network as it was exported.

    Attributes:
        networks: the backbone with the heads that lay beside it.
        centers: of its targets, by term; empty unless they were centred.
    """

    networks: nn.ModuleDict
    centers: Tensors


def with_heads(
    backbone: nn.Module, info: BackboneInfo, export: str, wanted: ObjectiveRecipe
) -> Trained:
    """A backbone with the heads that lie beside it.

    Args:
        backbone: of the export.
        info: its card, which tells how the heads are built.
        export: the folder.
        wanted: the objective that will use them.

    Raises:
        RecipeError: the objective wants other prototypes than the heads have, or iBOT of a network
            that was trained without.
        WeightsError: the heads are damaged, or not those that the card describes.
    """
    try:
        told = dict(info.training)["recipe"]["objective"]
        made = ObjectiveRecipe.model_validate(told)
    except (KeyError, TypeError, ValidationError) as error:
        raise WeightsError(
            f"The card in {export} does not tell how the heads beside it are built. Take an export "
            f"of a run of this version, or remove {HEADS} from the folder to go without."
        ) from error
    ours, theirs = (
        (o.prototypes, (None if o.shared_head else o.ibot_prototypes) or o.prototypes)
        for o in (wanted, made)
    )
    asks_ibot, had_ibot = wanted.ibot_weight > 0, made.ibot_weight > 0
    if asks_ibot and not had_ibot:
        raise RecipeError(
            f"The network in {export} was trained without iBOT, so it has no head for it. Set "
            "objective.ibot_weight=0."
        )
    if ours[0] != theirs[0] or (asks_ibot and ours[1] != theirs[1]):
        raise RecipeError(
            f"The heads in {export} have {theirs[0]} and {theirs[1]} prototypes (DINO, iBOT) and "
            f"the recipe wants {ours[0]} and {ours[1]}. Set objective.prototypes, "
            "objective.ibot_prototypes and objective.shared_head as theirs were."
        )
    built = make_networks(backbone, made, seed=0)
    try:
        tensors = load_file(Path(export) / HEADS)
        centers = {
            key.removeprefix(CENTER): tensors.pop(key)
            for key in list(tensors)
            if key.startswith(CENTER)
        }
        own = {f"backbone.{key}": tensor for key, tensor in backbone.state_dict().items()}
        built.load_state_dict(own | tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WeightsError(
            f"The heads in {export} cannot be read, or are not those of its card "
            f"({type(error).__name__}). Export that run again."
        ) from error
    if not asks_ibot and "ibot_head" in built:
        del built["ibot_head"]
        centers.pop("ibot", None)
    return Trained(built, centers)


def refuse_untrained(setting: str, source: str, info: BackboneInfo) -> None:
    """Refuses a teacher with random weights.

    Raises:
        RecipeError: with the setting that names it.
    """
    if info.training.get("weights") == "random":
        raise RecipeError(
            f"{setting} is {source}, an architecture with random weights, which can teach nothing. "
            "Name an export, a weights file, or hub: and a name of timm."
        )


def gram_network(
    gram: GramRecipe | None,
    student: nn.Module,
    info: BackboneInfo,
    origin: Origin,
    notices: Notices,
) -> nn.Module | None:
    """The Gram teacher's backbone, where it is not the moving average itself.

    Raises:
        RecipeError: its tensors are not of the student's names and shapes, or it was trained with
            another normalisation.
    """
    if gram is None or gram.teacher in ("ema", "live", "start"):
        return None
    network, other = build_network(origin.find(gram.teacher), bands=info.bands, notices=notices)
    refuse_untrained("gram.teacher", gram.teacher, other)
    theirs, ours = (
        {name: tensor.shape for name, tensor in module.state_dict().items()}
        for module in (network, merged(student))
    )
    if theirs != ours:
        raise RecipeError(
            f"The Gram teacher {gram.teacher} has width {other.embed_dim}, depth {other.depth} and "
            f"patches of {other.patch_size} px, the student width {info.embed_dim}, depth "
            f"{info.depth} and {info.patch_size} px, or they differ in other tensors. Take an "
            "earlier state of the same network."
        )
    told = zip((*other.mean, *other.std), (*info.mean, *info.std), strict=True)
    if not all(math.isclose(his, mine, rel_tol=1e-3) for his, mine in told):
        raise RecipeError(
            f"The Gram teacher {gram.teacher} was trained with mean {rounded(other.mean)} and std "
            f"{rounded(other.std)}, and the student has {rounded(info.mean)} and "
            f"{rounded(info.std)}, so it would see other images. Take an earlier state of the same "
            "network."
        )
    return network


def rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    """For a sentence."""
    return tuple(round(number, 3) for number in numbers)

"""What a run would be, before it runs: settings, memory, time, and what makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dino_adapters.contracts import RecipeError, Table
from dino_adapters.data import load_source
from dino_adapters.pretrain.announce import judging
from dino_adapters.pretrain.assemble import import_modules, labelled_for
from dino_adapters.pretrain.estimate import (
    decoding_seconds,
    divided_trial,
    looking_seconds,
    memory_line,
    mixture_share,
    seconds_line,
    trial_recipe,
    trials,
)
from dino_adapters.pretrain.intake import Intake
from dino_adapters.pretrain.origin import snapshot_folder
from dino_adapters.pretrain.phase_plan import PhasePlan
from dino_adapters.pretrain.resolve import Reason, resolve
from dino_adapters.pretrain.sizes import snapshot_steps
from dino_adapters.pretrain.trial import Measured, NoRoomError, Trial, export_networks, measure
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices, duration
from dino_adapters.runtime.runfolder import RunFolder


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        recipe: with everything settled that follows from the number of images.
        reasons: why, and what speaks against values that were given.
        phases: each one; a single one without phases.
    """

    recipe: PretrainRecipe
    reasons: tuple[Reason, ...]
    phases: tuple[PhasePlan, ...]

    @property
    def fits(self) -> bool:
        """Whether all phases do."""
        return all(phase.fits for phase in self.phases)

    @property
    def total_s(self) -> float:
        """Seconds of the whole run."""
        return sum(phase.total_s for phase in self.phases)

    def table(self) -> Table:
        """A column for each phase."""
        columns = [phase.cells() for phase in self.phases]
        names = list(dict.fromkeys(name for cells in columns for name in cells))
        rows = tuple((name, *(cells.get(name, "–") for cells in columns)) for name in names)
        header = ("", *(phase.name or "run" for phase in self.phases))
        return Table(
            "What the run would be", header, rows, "Measured on a few steps, and computed."
        )

    def lines(self) -> tuple[str, ...]:
        """Reasons and warnings, then size and fit of each phase, then the time."""
        fits = [line for phase in self.phases for line in phase.lines()]
        said = [reason.sentence for reason in self.reasons]
        return (*said, *fits, f"About {duration(self.total_s)} in all.")

    def as_json(self) -> dict[str, Any]:
        """For machines: numbers in bytes and seconds."""
        return {
            "fits": self.fits,
            "seconds": self.total_s,
            "reasons": [asdict(r) | {"sentence": r.sentence} for r in self.reasons],
            "phases": [phase.as_json() for phase in self.phases],
            "recipe": self.recipe.model_dump(mode="json"),
        }


def make_plan(
    recipe: PretrainRecipe,
    *,
    device: str | None = None,
    notices: Notices | None = None,
    trial: Callable[[Trial], Measured] = measure,
) -> Plan:
    """Finds out what a run would be: reads some images, takes a few steps, trains nothing.

    Args:
        recipe: with or without phases; nothing is written into any run's folder.
        device: in place of the recipe's.
        notices: collects what was skipped, converted or assumed.
        trial: takes the steps.

    Raises:
        DinoAdaptersError: what the run itself would have raised before its first step.
        RecipeError: not even a few images fit into memory.
    """
    notices = Notices() if notices is None else notices
    if device is not None:
        recipe = recipe.model_copy(update={"device": device})
    import_modules(recipe.imports)
    source = load_source(recipe.data, notices=notices)
    recipe, reasons = resolve(recipe, len(Intake(source, recipe, notices).keys))
    phases = []
    with TemporaryDirectory() as folder:
        earlier: dict[str, str] = {}
        parts = [(p.name, p.start or "fresh", plan) for p, plan in recipe.plans()]
        for name, start, plan in parts or [("", "fresh", recipe)]:
            intake = Intake(source, plan, notices)
            try:
                phases.append(_phase(name, plan, intake, Trial({}, start, dict(earlier)), trial))
                if len(phases) < len(parts):  # a later phase starts from it
                    export_to = str(Path(folder) / name)
                    told = plan.model_dump(mode="json")
                    export_networks(Trial(told, start, dict(earlier), export_to))
                    link_snapshots(plan, RunFolder(Path(export_to)))
                    earlier[name] = export_to
            except RecipeError as error:
                raise RecipeError(f"Phase {name}: {error}" if name else str(error)) from error
    return Plan(recipe, reasons, tuple(phases))


def link_snapshots(plan: PretrainRecipe, folder: RunFolder) -> None:
    """Lets the export stand for the snapshots of a phase, which later ones may name."""
    for step in snapshot_steps(plan):
        snapshot = snapshot_folder(folder, step)
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(folder.export, target_is_directory=True)


def unsaid(warnings: Sequence[str], intake: Intake) -> tuple[str, ...]:
    """Warnings of a trial, which has no voice of its own, that were not given here already."""
    given = (*intake.notices.counts, *filter(None, [intake.size_note]))
    return tuple(line for line in warnings if not line.startswith(given))


def can_divide(recipe: PretrainRecipe) -> bool:
    """Whether micro-batches are allowed: not where Gram compares patches across the batch."""
    gram = recipe.gram
    return gram is None or (gram.level == "image" and gram.tokens == "all")


def _phase(
    name: str,
    plan: PretrainRecipe,
    intake: Intake,
    told: Trial,
    trial: Callable[[Trial], Measured],
) -> PhasePlan:
    batch, images = plan.optim.batch_size, len(intake.keys)
    labelled = labelled_for(plan, intake.source, intake.notices)  # its errors cost no trial
    micro = min(plan.parallel.micro_batch or batch, batch)

    def tried(batch: int, micro: int) -> Measured:
        small = trial_recipe(plan, intake.side, batch, micro)
        return trial(replace(told, recipe=small.model_dump(mode="json")))

    try:
        whole = trials(tried, micro)
    except NoRoomError:
        raise RecipeError(
            "Not even four images at a time fit into memory. Take a smaller network, smaller crops "
            "or fewer prototypes."
        ) from None
    high, share = whole[1], mixture_share(plan)
    memory, seconds = memory_line(whole, None), seconds_line(whole, None).times(share)
    kept = min(int(plan.data.memory_gb * 1e9), images * high.image_bytes)
    seen = 0 if labelled is None else len(labelled.gallery) + len(labelled.queries)
    found = PhasePlan(
        name=name,
        recipe=plan,
        images=images,
        side=intake.side,
        size_note=intake.size_note,
        measured=high,
        memory=memory,
        seconds=seconds,
        kept_bytes=kept,
        decoding_s=decoding_seconds(plan, images, kept, seconds.of(batch, micro), high),
        looks_s=looking_seconds(plan, images, seen, high),
        judging=judging(plan, labelled, intake.notices),
        warnings=unsaid(high.warnings, intake),
    )
    if micro == batch and (found.fits or not can_divide(plan)):
        return found
    parts = divided_trial(tried, whole[0])
    return replace(
        found,
        memory=memory_line(whole, parts),
        seconds=seconds_line(whole, parts).times(share),
        divided=True,
    )

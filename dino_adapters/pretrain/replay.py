"""A step that was left out, once more: which images, terms and layers were not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dino_adapters.contracts import CheckpointError
from dino_adapters.pretrain.accumulate import accumulate
from dino_adapters.pretrain.assemble import build_run, import_modules, settle_precision
from dino_adapters.pretrain.checkpoint import checkpoints, meta_of
from dino_adapters.pretrain.feed import Batch
from dino_adapters.pretrain.guard import STATE, kept_batch
from dino_adapters.pretrain.optim import Timetable
from dino_adapters.pretrain.origin import Origin
from dino_adapters.pretrain.run import Run
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import ALONE, repeatable

SHOWN = 8


@dataclass(frozen=True, slots=True)
class Replay:
    """What a refused step shows when it is computed again; nothing is applied.

    Attributes:
        step: its number.
        images: keys of images with pixels that are not finite.
        flat: keys of images that are one colour.
        terms: name -> value of each term of the loss.
        norms: name -> norm of each module's gradient.
        layer: the first layer whose output was not finite, or empty.
    """

    step: int
    images: tuple[str, ...]
    flat: tuple[str, ...]
    terms: dict[str, float]
    norms: dict[str, float]
    layer: str

    def sentences(self) -> tuple[str, ...]:
        """What was found, one thing after the other, and what to do."""
        terms = ", ".join(f"{name} {value:.4g}" for name, value in self.terms.items())
        norms = ", ".join(f"{name} {value:.4g}" for name, value in self.norms.items())
        said = [f"Step {self.step} again: {terms}.", f"Gradient norms: {norms}."]
        if self.images:
            said.append(
                f"{len(self.images)} images have pixels that are not finite: "
                f"{_listed(self.images)}. Mend them or take them out."
            )
        if self.flat:
            said.append(f"{len(self.flat)} images are of one colour: {_listed(self.flat)}.")
        if self.layer:
            said.append(f"The first output that is not finite is that of {self.layer}.")
        finite = all(map(_is_finite, (*self.terms.values(), *self.norms.values())))
        if finite:
            said.append(
                "All of it is finite this time: the cause was not in these images and weights. "
                "Look at the memory and the device, or at a change of code in between."
            )
        elif not self.images:
            said.append(
                "The images are finite, so the weights have grown too far: lower optim.lr, or "
                "raise the teacher's temperature."
            )
        return tuple(said)


def replay(place: Path, notices: Notices | None = None) -> Replay:
    """Computes a refused step again, from its own images and weights.

    Args:
        place: `refused/step_NNNNNNNN` of a run.
        notices: collects what is assumed on the way.

    Raises:
        CheckpointError: the folder holds no refused step.
    """
    folder = RunFolder(place.resolve().parent.parent)
    saved = checkpoints(place / STATE)
    if not folder.holds_a_run or not saved:
        raise CheckpointError(
            f"{place} is no refused step of a run. Give a folder refused/step_NNNNNNNN inside the "
            "folder of a run."
        )
    batch = kept_batch(place)
    notices = Notices() if notices is None else notices
    told = json.loads(folder.recipe_file.read_text(encoding="utf-8"))
    recipe = PretrainRecipe.model_validate(told)
    import_modules(recipe.imports)
    recipe = settle_precision(recipe, ALONE, saved[-1], None)
    run = build_run(recipe, ALONE, origin_of(folder), notices)
    meta = run.restore(saved[-1])
    return repeated(run, batch, meta.progress.step - 1, meta_of(saved[-1]).progress.pace)


def repeated(run: Run, batch: Batch, step: int, pace: float) -> Replay:
    """Forward and backward of one step, watched layer by layer; nothing is applied."""
    knobs = Timetable(run.recipe, pace=pace).at(step)
    run.freeze(frozen=knobs.frozen)
    run.learner.before(step)
    run.optimizer.zero_grad(set_to_none=True)
    with repeatable(run.learner.device), first_not_finite(run.learner.networks()) as found:
        losses = accumulate(
            run.learner,
            run.crops(step, batch),
            knobs,
            micro_batch=run.recipe.parallel.micro_batch,
            seed_draws=lambda part: run.seed_draws(step, part),
        )
    norms = {
        name: float(nn.utils.get_total_norm(gradients))
        for name, module in run.modules().items()
        if (gradients := [p.grad for p in module.parameters() if p.grad is not None])
    }
    flat = batch.images.flatten(1)
    finite = flat.isfinite().all(dim=1)
    constant = finite & (flat.amax(dim=1) == flat.amin(dim=1))
    return Replay(
        step=step,
        images=tuple(key for key, good in zip(batch.keys, finite, strict=True) if not good),
        flat=tuple(key for key, one in zip(batch.keys, constant, strict=True) if one),
        terms=losses.numbers(),
        norms=norms,
        layer=found[0] if found else "",
    )


@contextmanager
def first_not_finite(networks: dict[str, nn.ModuleDict]) -> Iterator[list[str]]:
    """Names of layers in the order in which their outputs were found not to be finite."""
    found: list[str] = []
    handles = []
    for name, parts in networks.items():
        for path, module in parts.named_modules():
            if any(True for _ in module.children()):
                continue  # its parts say it first

            def look(
                _module: nn.Module, _inputs: Any, output: Any, where: str = f"{name}.{path}"
            ) -> None:
                if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    found.append(where)

            handles.append(module.register_forward_hook(look))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def origin_of(folder: RunFolder) -> Origin:
    """What a phase started from, by the recipe of the run around it; fresh for a run by itself."""
    around = RunFolder(folder.path.parent.parent)
    if folder.path.parent.name != "phases" or not around.holds_a_run:
        return Origin()
    told = json.loads(around.recipe_file.read_text(encoding="utf-8"))
    earlier: dict[str, RunFolder] = {}
    for index, (phase, _) in enumerate(PretrainRecipe.model_validate(told).plans(), start=1):
        part = around.phase(index, phase.name)
        if part.path == folder.path:
            return Origin(phase.start or "fresh", earlier, phased=True)
        earlier[phase.name] = part
    return Origin()


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _listed(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:SHOWN]) + (", …" if len(keys) > SHOWN else "")

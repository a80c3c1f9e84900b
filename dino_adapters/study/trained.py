"""The two runs of `start`, and the networks before and after them."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_adapters.backbones import FrozenBackbone, build_network, load_backbone
from dino_adapters.contracts import RGB, Band
from dino_adapters.pretrain import pretrain
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.console import Notices, duration
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import pick_device
from dino_adapters.study.plans import (
    CONTINUE_STEPS,
    SCRATCH,
    SCRATCH_STEPS,
    continue_plan,
    scratch_plan,
)
from dino_adapters.study.setting import Setting

LOGGER = logging.getLogger(__name__)
SCRATCH_SHARE = 0.25
PROBE_STEPS, PROBE_COLD = 6, 1


@dataclass(frozen=True)
class Names:
    """Rows of the table."""

    pixels: str = "raw pixels"
    statistics: str = "image statistics"
    untrained: str = "micro ViT, untrained"
    scratch: str = "micro ViT, from nothing"
    frozen: str = "public network, frozen"
    continued: str = "public network, continued"


@dataclass(frozen=True)
class Trained:
    """Both runs, and the networks before and after them."""

    before: dict[str, FrozenBackbone]
    runs: dict[str, RunFolder]
    device: str

    def after(self, name: str) -> FrozenBackbone:
        """The exported teacher of a run."""
        return load_backbone(self.runs[name].export, device=self.device)

    def networks(self) -> dict[str, FrozenBackbone]:
        """Each network beside what became of it."""
        found = {}
        for before, after in zip(self.before, self.runs, strict=True):
            found |= {before: self.before[before], after: self.after(after)}
        return found


def named_after(weights: str) -> Names:
    """Rows that carry the name of the user's own start weights."""
    name = Path(weights).name
    return Names(frozen=f"{name}, frozen", continued=f"{name}, continued")


def networks_before(
    setting: Setting, weights: str, names: Names, seed: int, notices: Notices
) -> dict[str, FrozenBackbone]:
    """The two networks before training: the micro ViT's random start, and the given one."""
    device = pick_device()
    return {
        names.untrained: FrozenBackbone(
            *build_network(
                SCRATCH, bands=setting.bands, seed=derive(seed, "network"), notices=notices
            )
        ).to(device),
        names.frozen: load_backbone(
            weights, bands=bands_of_frozen(setting), device=device, notices=notices
        ),
    }


def train_both(
    setting: Setting,
    before: dict[str, FrozenBackbone],
    folder: RunFolder,
    told: dict[str, Any],
    names: Names,
    notices: Notices,
    *,
    quiet: bool,
) -> Trained:
    """Runs both plans; a run that is finished already is taken as it is."""
    images, split, side = setting.training, setting.split_file, setting.side
    seed, weights, minutes = told["seed"], told["weights"], told["minutes"]
    scratch = scratch_plan(images, split, side=side, steps=SCRATCH_STEPS, seed=seed)
    info = before[names.frozen].info
    continued = continue_plan(
        images, split, weights, info, side=side, steps=CONTINUE_STEPS, seed=seed
    )
    plans = (
        ("scratch", names.scratch, scratch, SCRATCH_SHARE),
        ("continued", names.continued, continued, 1 - SCRATCH_SHARE),
    )
    runs = {}
    for short, name, plan, share in plans:
        run = RunFolder(folder.path / short)
        if minutes is not None:
            plan = fit_to_time(plan, run, 60 * minutes * share)
        if not (run.export / "card.json").exists():
            LOGGER.info("training: %s", name)
            pretrain(plan, run, resume=True, quiet=quiet, notices=notices)
        runs[name] = run
    return Trained(before, runs, str(pick_device()))


def bands_of_frozen(setting: Setting) -> tuple[Band, ...] | None:
    """The bands a frozen network reads: its own where the images have them (None), else all.

    Spread filters that were never trained cost accuracy, so they are the last resort.
    """
    there = {band.name for band in setting.bands}
    is_photo = there == {"grey"} or {band.name for band in RGB} <= there
    return None if is_photo else setting.bands


def fit_to_time(plan: PretrainRecipe, run: RunFolder, seconds: float) -> PretrainRecipe:
    """The plan with as many steps as fit into the time, by a short probe; asked once per run."""
    if run.holds_a_run:
        steps = json.loads(run.recipe_file.read_text(encoding="utf-8"))["steps"]
        return plan.model_copy(update={"steps": steps})
    probe = RunFolder(run.path.with_name(f".{run.path.name}.probe"))
    shutil.rmtree(probe.path, ignore_errors=True)
    still = plan.checkpoint.model_copy(update={"snapshots": 0, "every_steps": PROBE_STEPS})
    pretrain(plan.model_copy(update={"steps": PROBE_STEPS, "checkpoint": still}), probe, quiet=True)
    rows = probe.rows_with("loss")
    # The first steps decode images and fill caches: they are slower than the rest of the run.
    each = max(rows[-1]["seconds"] - rows[PROBE_COLD]["seconds"], 1e-3)
    each /= PROBE_STEPS - 1 - PROBE_COLD
    shutil.rmtree(probe.path)
    if seconds < PROBE_STEPS * each:
        LOGGER.warning(
            "The time allows for %d steps only: that says nothing about pretraining. Give more "
            "--minutes.",
            int(seconds / each),
        )
    steps = max(PROBE_STEPS, int(seconds / each))
    LOGGER.info("timing trial: %.2f s a step, %d steps for %s", each, steps, duration(seconds))
    return plan.model_copy(update={"steps": steps})

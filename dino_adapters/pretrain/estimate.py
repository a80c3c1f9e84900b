"""From a few measured steps to a whole run: straight lines, and what comes on top of steps.

    memory of a step  = fixed + micro * m + batch * B
    seconds of a step = fixed + batch * B + part * (B / m)

B being the images of a step and m those that go through the networks at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dino_adapters.pretrain.augment import Sizes
from dino_adapters.pretrain.sizes import all_sizes, largest_global
from dino_adapters.pretrain.trial import MOST_STEPS, Measured, NoRoomError
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.running import MonitorRecipe

PATIENCE_S = 4.0
"""A step of a trial may take about so long on a CPU."""
MARGIN = 0.9
"""Share of the free memory that is planned with: peaks are right within a tenth."""
SMALL = 8
"""Images of the smaller trial, where the run takes four times as many or more."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes or seconds of a step: `fixed + micro * m + batch * B + part * ceil(B / m)`."""

    fixed: float
    micro: float = 0.0
    batch: float = 0.0
    part: float = 0.0

    def of(self, batch: int, micro: int) -> float:
        """Of a step of `batch` images, `micro` at a time."""
        parts = math.ceil(batch / micro)
        return self.fixed + self.micro * micro + self.batch * batch + self.part * parts

    def times(self, factor: float) -> Cost:
        """All of it, so many times."""
        return Cost(
            self.fixed * factor, self.micro * factor, self.batch * factor, self.part * factor
        )


def memory_line(whole: Sequence[Measured], divided: Measured | None) -> Cost:
    """Bytes of a step through two trials, and a third one in micro-batches of the first's size.

    Without a third nothing tells micro-batch and batch apart: all goes to `micro`.
    """
    low, high = whole
    each = 0.0
    if divided is not None:
        more = divided.batch - low.batch
        each = max((divided.peak_bytes - low.peak_bytes) / more, 0.0)
    rise = high.peak_bytes - low.peak_bytes - each * (high.batch - low.batch)
    micro = max(rise / (high.micro - low.micro), 1.0)  # below that only noise was measured
    # Through the larger trial, which says more about large batches.
    return Cost(high.peak_bytes - micro * high.micro - each * high.batch, micro, each)


def seconds_line(whole: Sequence[Measured], divided: Measured | None) -> Cost:
    """Seconds of a step through the same trials; of images alone, where a line would fall."""
    low, high = whole
    trials = [low, high] if divided is None else [low, high, divided]
    rows = [[1.0, t.batch, math.ceil(t.batch / t.micro)][: len(trials)] for t in trials]
    took = np.array([t.step_seconds for t in trials])
    fixed, batch, part = 0.0, 0.0, 0.0
    if np.linalg.matrix_rank(rows) == len(trials):
        fixed, batch, part = [*np.linalg.solve(np.array(rows), took).tolist(), 0.0][:3]
    if batch <= 0.0:
        return Cost(0.0, batch=high.step_seconds / high.batch)
    if part < 0.0:
        return seconds_line(whole, None)
    return Cost(fixed, batch=batch, part=part)


def trials(tried: Callable[[int, int], Measured], micro: int) -> tuple[Measured, Measured]:
    """Two trials without division: a small one, and one as near to `micro` as patience goes.

    Args:
        tried: takes steps of so many images, so many at a time.
        micro: images that the run takes at a time.

    Raises:
        NoRoomError: the second does not fit even at twice the first.
    """
    few = max(min(SMALL, micro // 4), 2)
    low = tried(few, few)
    wanted, least = max(micro, 2 * few), 2 * few
    while wanted > least and _too_much(low, wanted / few):
        wanted = max(wanted // 2, least)
    try:
        return low, tried(wanted, wanted)
    except NoRoomError:
        if wanted == least:
            raise
        return low, tried(least, least)


def _too_much(low: Measured, times: float) -> bool:
    slow = low.device == "cpu" and low.step_seconds * times > PATIENCE_S
    return slow or low.peak_bytes * times > MARGIN * low.available_bytes


def divided_trial(tried: Callable[[int, int], Measured], low: Measured) -> Measured:
    """A trial in micro-batches of the small one's size, as many as patience allows."""
    parts = min(max(int(PATIENCE_S / low.step_seconds), 3), 16)
    return tried(parts * low.batch, low.batch)


def trial_recipe(recipe: PretrainRecipe, side: int, batch: int, micro: int) -> PretrainRecipe:
    """A recipe for a few steps, each as costly as steps of the run ever are.

    Nothing is frozen, all terms are on, and crops have the largest sizes of a mixture.

    Args:
        recipe: of one phase, settled.
        side: at which the run reads images.
        batch: images of a step.
        micro: images at a time.
    """
    o, gram = recipe.objective, recipe.gram
    largest = max(all_sizes(recipe), key=lambda sizes: tokens(recipe, sizes, 1))
    group = o.koleo_group if o.koleo_group and batch % o.koleo_group == 0 else None
    off = ("freeze_backbone", "backbone_ramp", "momentum_span", "local_ramp", "regularizer_warmup")
    changes = {
        "steps": MOST_STEPS,
        # A rate so low that fresh networks stay finite: a refused step would cost less.
        "optim": {"batch_size": batch, "lr": 1e-5, "lr_end": 0.0, "lr_rule": "none"},
        "objective": {
            "koleo_group": group,
            "koleo_neighbours": min(o.koleo_neighbours, (group or batch) - 1),
        },
        "parallel": {"micro_batch": micro if micro < batch else None},
        "schedule": dict.fromkeys(off, 0.0),
        "monitor": MonitorRecipe(every=0.0).model_dump(),
        "gate": None,
        "checkpoint": {"snapshots": 0},
        "data": {"image_size": side},
    }
    if recipe.crops.mixture:
        changes["crops"] = {
            "mixture": (),
            "global_size": largest.global_size,
            "local_size": largest.local_size,
        }
    if gram is not None:
        changes["gram"] = {
            "copy_at": None,
            "ramp": 0.0,
            "refresh_every": None,
            "first_refresh": 0,
            "max_refreshes": None,
        }
        if recipe.crops.mixture and gram.teacher != "live":
            changes["gram"]["size"] = largest.gram_size
    return recipe.changed(changes)


def tokens(recipe: PretrainRecipe, sizes: Sizes, patch_size: int) -> float:
    """Patches of an image's crops, weighted by passes: forward 1, forward and backward 3."""
    crops, patch = recipe.crops, patch_size**2
    whole = (3 + 1) * crops.global_count * sizes.global_size**2
    local = 3 * crops.local_count * sizes.local_size**2
    gram = crops.global_count * (sizes.gram_size or 0) ** 2
    return (whole + local + gram) / patch


def mixture_share(recipe: PretrainRecipe) -> float:
    """Mean work of a step over that at the largest sizes, which trials have; 1 without mixture."""
    choices = all_sizes(recipe)
    if len(choices) == 1:
        return 1.0
    work = [tokens(recipe, sizes, 1) for sizes in choices]
    chances = [m.probability for m in recipe.crops.mixture]
    return sum(w * p for w, p in zip(work, chances, strict=True)) / sum(chances) / max(work)


def decoding_seconds(
    recipe: PretrainRecipe, images: int, kept: int, step_s: float, seen: Measured
) -> float:
    """Seconds that reading adds to a run, beyond what goes on while steps are computed.

    Args:
        recipe: of the phase.
        images: how many there are.
        kept: bytes of decoded images that stay in memory, and are decoded once.
        step_s: seconds of a step.
        seen: a trial.
    """
    asked = recipe.steps * recipe.optim.batch_size
    kept_share = min(kept / max(images * seen.image_bytes, 1), 1.0)
    again = max(asked - images, 0) * (1.0 - kept_share)
    work = (min(asked, images) + again) * seen.decode_seconds
    workers, here = recipe.data.workers, cores()
    if not workers:
        return work
    free = here if seen.device != "cpu" else here - torch.get_num_threads()
    if free < 1:  # readers and the network share the cores
        return work / here
    return max(work / min(workers, free) - recipe.steps * step_s, 0.0)


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def looking_seconds(recipe: PretrainRecipe, images: int, labelled: int, seen: Measured) -> float:
    """Seconds of all looks, about: forward passes at every size, and reading the labelled files.

    Args:
        recipe: of the phase.
        images: of the run.
        labelled: images with labels that a look reads.
        seen: the largest trial.
    """
    told, side = recipe.monitor, largest_global(recipe)
    looks = round(1 / told.every) + 1 if told.every else 2 if recipe.gate is not None else 0
    passes = sum(size**2 for size in seen.look_sizes) / side**2
    probes = labelled * (passes * seen.look_seconds + seen.decode_seconds)
    verdict = probes if recipe.gate is not None else 0.0
    return looks * (min(told.images, images) * seen.look_seconds + probes) + verdict

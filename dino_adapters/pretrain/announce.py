"""What is said before the first step: what was settled, who learns from what, and for how long."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from dino_adapters.contracts import BackboneInfo
from dino_adapters.measure.intervals import LEAST_GROUPS
from dino_adapters.pretrain.delivery import method_of
from dino_adapters.pretrain.labelled import LabelledSet, too_few
from dino_adapters.pretrain.resolve import Reason
from dino_adapters.pretrain.run import Run
from dino_adapters.pretrain.schedules import scaled_rate
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices

LOGGER = logging.getLogger(__name__)
FEW_CHANGE = 0.1
"""Share of answers that a continued network gives otherwise; 3 of 40 on the blood cells."""


def say(reasons: Sequence[Reason]) -> None:
    """Says what was settled and why, and what speaks against given values."""
    for reason in reasons:
        LOGGER.log(logging.WARNING if reason.warning else logging.INFO, "%s", reason.sentence)


def announce(run: Run) -> None:
    """Says what was resolved, before the first step."""
    recipe, name = run.recipe, run.infos[""].name
    if recipe.objective.ibot_weight > 0 and not run.learner.with_ibot and not recipe.distill:
        LOGGER.warning("%s has no mask token, so it trains without iBOT.", name)
    if run.progress.step >= recipe.steps or run.progress.ended:
        LOGGER.info("nothing is left to train: step %d of %d", run.progress.step, recipe.steps)
    else:
        _announce_training(run)
    for line in judging(recipe, run.labelled, run.notices):
        LOGGER.info("%s", line)


def _announce_training(run: Run) -> None:
    """Says who learns, from what, at which rate and for how long."""
    recipe, count, name = run.recipe, len(run.feed.keys), run.infos[""].name
    if run.progress.step:
        LOGGER.info("going on from step %d of %d", run.progress.step, recipe.steps)
    if recipe.distill is None:
        training = run.infos[""].training
        known = "random weights" if training.get("weights") == "random" else "trained weights"
        LOGGER.info("%s starts from %s", name, known)
    else:
        announce_students(run.infos)
    divided = "" if run.world.size == 1 else f", {run.world.size} processes"
    peak = scaled_rate(recipe.optim.lr, recipe.optim.batch_size, recipe.optim.lr_rule)
    if recipe.optim.lr_rule != "none":
        LOGGER.info(
            "the learning rate peaks at %.2g: optim.lr %g by the rule %s for batches of %d",
            peak,
            recipe.optim.lr,
            recipe.optim.lr_rule,
            recipe.optim.batch_size,
        )
    LOGGER.info(
        "%d images, %s, %s on %s%s: %d steps of %d images (%.1f passes), K = %d",
        count,
        name,
        method_of(recipe, run.learner),
        run.learner.device,
        divided,
        recipe.steps,
        recipe.optim.batch_size,
        recipe.steps * recipe.optim.batch_size / count,
        recipe.objective.prototypes,
    )


def announce_students(infos: dict[str, BackboneInfo]) -> None:
    """Says who learns from whom."""
    for student, info in infos.items():
        if student:
            LOGGER.info(
                "student %s: %s, %d wide; teacher %s",
                student,
                info.name,
                info.embed_dim,
                infos[""].name,
            )


def judging(
    recipe: PretrainRecipe, labelled: LabelledSet | None, notices: Notices
) -> tuple[str, ...]:
    """What the verdict will be read from, and how much it can show; nothing without a gate.

    Args:
        recipe: of the run or phase.
        labelled: images that its verdict is read from.
        notices: those that `labelled_set` was given: they hold its reason, if it had one.
    """
    if recipe.gate is None:
        return ()
    if labelled is None:
        why = too_few(notices) or "no labelled images"
        return (
            f"The gate has nothing to judge by ({why}), so it will export "
            f"{'the start' if recipe.gate.unshown == 'start' else 'the result'}, as "
            f"gate.unshown={recipe.gate.unshown} says. Label images with monitor.labels.",
        )
    queries, groups = len(labelled.queries), len(set(labelled.groups_of(labelled.queries)))
    counted = f"{len(labelled.gallery)} labelled images to choose by, {queries} to judge on"
    counted += f" in {groups} groups" if groups < queries else ""
    if groups < LEAST_GROUPS:
        return (
            f"{counted}: the gate needs {LEAST_GROUPS} groups to show a difference. Label images "
            "of more groups.",
        )
    # Of a mean over queries that change by 1 or not at all.
    reach = 100 * 1.96 * math.sqrt(FEW_CHANGE / queries)
    said = f"{counted}: an interval of about ± {reach:.1f} points, if one answer in ten changes"
    if groups < queries:
        said += ", and wider where images of a group change together"
    return (said, *_single_groups(labelled))


def _single_groups(labelled: LabelledSet) -> tuple[str, ...]:
    """Says where resampling groups cannot show how much those of a class differ."""
    held: dict[str, set[str]] = {}
    for key in labelled.queries:
        held.setdefault(labelled.labels[key], set()).add(labelled.groups[key])
    alone = sorted(label for label, groups in held.items() if len(groups) == 1)
    if not alone:
        return ()
    return (
        f"{len(alone)} of {len(held)} classes have one group to judge on (first: '{alone[0]}'), so "
        "the interval cannot know how much groups of a class differ. Label more groups of them.",
    )

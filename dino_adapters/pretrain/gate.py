"""Better, worse, or no difference shown: what a run ends with, and which network it delivers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from dino_adapters.contracts import DataError
from dino_adapters.measure.intervals import LEAST_GROUPS, paired_bootstrap
from dino_adapters.pretrain.answers import (
    LEAST_CHANGED,
    gains_of_groups,
    how_many_changed,
    mean_recall,
    recall_weights,
)
from dino_adapters.pretrain.labelled import LabelledSet, too_few
from dino_adapters.pretrain.probe import Look
from dino_adapters.pretrain.verdict import (
    Verdict,
    images_of,
    in_points,
    reading,
    sizes_of,
    verdict_sentence,
)
from dino_adapters.recipes.running import GateRecipe
from dino_adapters.runtime.console import Notices

Choice = Literal["start", "continued"]
LEVEL = 0.95
RESAMPLES = 4000
NAMES = {"start": "the network that the run started from", "continued": "the continued network"}
CANDIDATES = "candidates"
"""Folder of a run that holds both networks, each by the name of its choice."""
GATE = "gate.json"
"""The verdict, in the folder of the run."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Two networks on the same images: balanced accuracies and their difference.

    Attributes:
        probes: Those of k-NN and of the linear probe, start and now.
        difference: Now less start, both probes averaged.
        low: Lower end of its 95 % interval; None with too few groups, or too few changed ones.
        high: Upper end.
        queries: Images that both were asked.
        groups: Groups that they make.
        changed: Groups about which the answers differ in number.
    """

    probes: tuple[tuple[float, float], tuple[float, float]]
    difference: float
    low: float | None
    high: float | None
    queries: int
    groups: int
    changed: int


def judge(start: Look, now: Look, labelled: LabelledSet, *, seed: int = 0) -> Verdict:
    """Compares what two looks answered, at whatever size each was read.

    Args:
        start: The network that the run started from.
        now: The continued network.
        labelled: What both looked at.
        seed: Of the resampling.

    Raises:
        DataError: a look is of other images.
    """
    _check_same_images(start, now, labelled)
    both = start.answered & now.answered
    keys = [key for key, there in zip(labelled.queries, both, strict=True) if there]
    found = _paired(start.answers[:, both], now.answers[:, both], keys, labelled, seed)
    knn, linear = found.probes
    verdict = Verdict(
        kind=_kind(found),
        difference=found.difference,
        low=found.low,
        high=found.high,
        knn=knn,
        linear=linear,
        queries=found.queries,
        groups=found.groups,
        sizes=(start.size, now.size),
        sentence="",
    )
    return replace(verdict, sentence=verdict_sentence(verdict, found.changed, seen=labelled.seen))


def change_of_selection(start: Look, now: Look, labelled: LabelledSet) -> Paired:
    """The same comparison on the gallery, which looks are chosen by: what may decide on the way.

    Raises:
        DataError: a look is of other images.
    """
    _check_same_images(start, now, labelled)
    both = start.asked & now.asked
    keys = [key for key, there in zip(labelled.gallery, both, strict=True) if there]
    return _paired(start.held_out[:, both], now.held_out[:, both], keys, labelled, seed=0)


def agreed(own: Verdict, same_size: Verdict) -> Verdict:
    """What both comparisons show: `better` and `worse` need both; where they differ, both are told.

    Which size suits a network best is itself a guess from labelled images. Where the guesses for
    start and result differ, the change of size alone can look like a gain of some points.

    Args:
        own: with the start at the size that suits it best.
        same_size: with the start at the size of the result.
    """
    if own.sizes == same_size.sizes:
        return own
    kinds = {own.kind, same_size.kind}
    if kinds == {"better", "worse"}:
        sentence = (
            "No difference to the start is shown: this network is better than one reading of it "
            "and worse than the other."
        )
        told = " ".join(reading(one) for one in (own, same_size))
        return replace(own, kind="same", sentence=f"{sentence} {told}", other=same_size.numbers)
    if len(kinds) == 1:
        found, other = sorted((own, same_size), key=lambda one: abs(one.difference or 0.0))
    else:  # what is not shown, or cannot be, decides
        found = next(o for k in ("unknown", "same") for o in (own, same_size) if o.kind == k)
        other = same_size if found is own else own
    return replace(found, other=other.numbers, sentence=f"{found.sentence} {reading(other)}")


def unopposed(verdict: Verdict, chosen_by: Paired, *, seen: bool) -> Verdict:
    """A gain stands only where the images that the result was chosen by do not show a loss.

    Conservative: this can only turn `better` into `same`. The interval takes answers about left-out
    groups as independent, which they are not quite; with too few groups, or too few that changed,
    there is none, and nothing is opposed.

    Args:
        verdict: From the images that nothing was chosen on.
        chosen_by: The same two networks, at the same sizes, on those that were chosen by.
        seen: Whether training reads the images of the verdict, too.
    """
    loss = (chosen_by.difference, chosen_by.low, chosen_by.high)
    verdict = replace(verdict, chosen_by=loss)
    if verdict.kind != "better" or chosen_by.high is None or chosen_by.high >= 0:
        return verdict
    sentence = (
        f"No difference to the start is shown: {in_points(verdict.numbers)} on "
        f"{images_of(verdict, seen=seen)}, but {in_points(loss)} on the {chosen_by.queries} that "
        f"reading size and best look were chosen by (k-NN and linear probe averaged, "
        f"{sizes_of(verdict)})."
    )
    return replace(verdict, kind="same", sentence=sentence)


def unlabelled(notices: Notices | None = None) -> Verdict:
    """The verdict of a run without labelled images, or with too few of them.

    Args:
        notices: Those that `labelled_set` was given: they hold its reason, if it had one.
    """
    line = "" if notices is None else too_few(notices)
    reason = f"There are {line}" if line else "Nothing is labelled"
    more = "more images, of more classes or groups," if line else "some images"
    sentence = (
        f"Open: {reason[0].lower()}{reason[1:]}, so nothing shows whether this is better than the "
        f"start. Label {more} with monitor.labels, and name them with monitor.source where they "
        "are not among those of the run."
    )
    return Verdict("unknown", None, None, None, None, None, 0, 0, None, sentence)


def delivered(verdict: Verdict, gate: GateRecipe) -> Choice:
    """Which network is exported: the better one, or `gate.unshown` where none is shown to be."""
    if verdict.kind == "better":
        return "continued"
    if verdict.kind == "worse":
        return "start"
    return gate.unshown


def delivery_sentence(verdict: Verdict, gate: GateRecipe, step: int) -> str:
    """What is exported, why, and where the other network is.

    Args:
        verdict: Of the run.
        gate: What the recipe asks for.
        step: Steps after which the continued network was taken: its best look.
    """
    chosen = delivered(verdict, gate)
    other: Choice = "continued" if chosen == "start" else "start"
    names = {**NAMES, "continued": f"{NAMES['continued']} of step {step:,}"}
    shown = verdict.kind in ("better", "worse")
    why = "" if shown else f", as gate.unshown={gate.unshown} asks for where no difference is shown"
    return (
        f"Exported is {names[chosen]}{why}. {names[other].capitalize()} is in {CANDIDATES}/{other}."
    )


def early_stop(scores: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` looks brought no new best.

    Args:
        scores: `Look.selection` of all looks so far, that before the first step included.
        patience: Looks; 0 never stops.
    """
    if not patience or not scores:
        return False
    best = max(range(len(scores)), key=lambda index: (scores[index], -index))
    return len(scores) - 1 - best >= patience


def _check_same_images(start: Look, now: Look, labelled: LabelledSet) -> None:
    if {start.labelled, now.labelled} != {labelled.digest}:
        raise DataError(
            "Two looks at different labelled images cannot be compared. Look at both networks with "
            "the set that the run has now."
        )


def _paired(
    before: np.ndarray, after: np.ndarray, keys: Sequence[str], labelled: LabelledSet, seed: int
) -> Paired:
    """Compares answers `(2, n)`, right or wrong, about the same images.

    Groups of images are resampled for both networks alike; the two probes are fixed methods and
    their answers are averaged. Each image weighs as in balanced accuracy, and keeps that weight:
    averaging over the classes that a resample holds would make the interval a quarter too short
    where a class is a group. The interval is widened for few groups as Hesterberg advises (2015,
    The American Statistician 69(4), section 4.3: the expanded percentile interval).
    """
    labels, groups = labelled.labels_of(keys), labelled.groups_of(keys)
    knn, linear = (
        (mean_recall(a, labels), mean_recall(b, labels)) for a, b in zip(before, after, strict=True)
    )
    difference = (knn[1] - knn[0] + linear[1] - linear[0]) / 2
    weights = recall_weights(labels)
    gains, low, high = gains_of_groups(after, before, labels, groups), None, None
    changed = how_many_changed(gains)
    if len(gains) >= LEAST_GROUPS and changed >= LEAST_CHANGED:
        _, low, high = paired_bootstrap(
            after * weights,
            before * weights,
            groups,
            over_draws=False,
            seed=seed,
            resamples=RESAMPLES,
            level=_expanded(len(gains)),
        )
    return Paired((knn, linear), difference, low, high, len(keys), len(gains), changed)


def _expanded(units: int) -> float:
    """Level at which percentiles of so few units reach as far as a Student t interval."""
    reach = stats.t.ppf(0.5 + LEVEL / 2, units - 1) * np.sqrt(units / (units - 1))
    return float(2 * stats.norm.cdf(reach) - 1)


def _kind(found: Paired) -> Literal["better", "same", "worse", "unknown"]:
    if found.groups < LEAST_GROUPS:
        return "unknown"
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "same"
    return "better" if found.low > 0 else "worse"

"""Better, worse, or no difference shown: what a run ends with, and which network it delivers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from dino_adapters.contracts import DataError
from dino_adapters.measure.intervals import paired_bootstrap, units_of
from dino_adapters.pretrain.answers import mean_recall
from dino_adapters.pretrain.labelled import TOO_FEW, LabelledSet
from dino_adapters.pretrain.probe import Look
from dino_adapters.recipes.running import GateRecipe
from dino_adapters.runtime.console import Notices

Choice = Literal["start", "continued"]
LEAST_GROUPS = 10
"""Fewer groups of images than this are not resampled: the interval would be far too short."""
LEVEL = 0.95
RESAMPLES = 4000
NAMES = {"start": "the network that the run started from", "continued": "the continued network"}
CANDIDATES = {"start": "candidates/start", "continued": "candidates/continued"}
"""Folders of a run that hold both networks, whichever is exported."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run's network compares with its start. Shares of 1; `x 100` is points.

    Attributes:
        kind: `better` and `worse` where the whole interval is on one side of 0, `same` where no
            difference is shown, `unknown` without labels or with too few groups of images.
        difference: Balanced accuracy now less that of the start, k-NN and linear probe averaged;
            None without labels.
        low: Lower end of its 95 % interval over other images of the same kind; None where unknown.
        high: Upper end.
        knn: Balanced accuracy of the start and now; None without labels.
        linear: The same of the linear probe.
        queries: Images it was read from.
        groups: Groups that they make.
        sentence: All of this in words.
    """

    kind: Literal["better", "same", "worse", "unknown"]
    difference: float | None
    low: float | None
    high: float | None
    knn: tuple[float, float] | None
    linear: tuple[float, float] | None
    queries: int
    groups: int
    sentence: str

    def as_json(self) -> dict[str, Any]:
        """JSON-safe."""
        told = asdict(self)
        for name in ("knn", "linear"):
            told[name] = None if told[name] is None else list(told[name])
        return told


def judge(start: Look, now: Look, labelled: LabelledSet, *, seed: int = 0) -> Verdict:
    """Compares two looks at the same images, whatever sizes suited either network.

    Groups of queries are resampled for both networks alike; the two probes are fixed methods and
    their answers are averaged. Each image weighs as in balanced accuracy, and keeps that weight:
    averaging over the classes that a resample holds would make the interval a quarter too short
    where a class is a group. The interval is widened for few groups as Hesterberg advises (2015,
    The American Statistician 69(4), section 4.3: the expanded percentile interval).

    Args:
        start: The network that the run started from.
        now: The continued network.
        labelled: What both looked at.
        seed: Of the resampling.

    Raises:
        DataError: a look is of other images.
    """
    if {start.labelled, now.labelled} != {labelled.digest}:
        raise DataError(
            "Two looks at different labelled images cannot be compared. Look at both networks with "
            "the set that the run has now."
        )
    both = start.answered & now.answered
    keys = [key for key, there in zip(labelled.queries, both, strict=True) if there]
    labels, groups = labelled.labels_of(keys), labelled.groups_of(keys)
    before, after = start.answers[:, both], now.answers[:, both]
    probes = [
        (mean_recall(a, labels), mean_recall(b, labels)) for a, b in zip(before, after, strict=True)
    ]
    units = len(units_of(groups)[0])
    difference = float(np.mean([b - a for a, b in probes]))
    low = high = None
    if units >= LEAST_GROUPS:
        weights = _weights(labels)
        _, low, high = paired_bootstrap(
            after * weights,
            before * weights,
            groups,
            over_draws=False,
            seed=seed,
            resamples=RESAMPLES,
            level=_expanded(units),
        )
    kind = "unknown" if low is None or high is None else _kind(low, high)
    sentence = _sentence(kind, difference, low, high, len(keys), units, seen=labelled.seen)
    knn, linear = probes
    return Verdict(kind, difference, low, high, knn, linear, len(keys), units, sentence)


def unlabelled(notices: Notices | None = None) -> Verdict:
    """The verdict of a run without labelled images, or with too few of them.

    Args:
        notices: Those that `labelled_set` was given: they hold its reason, if it had one.
    """
    lines = [] if notices is None else [line for line in notices.counts if line.startswith(TOO_FEW)]
    reason = f"There are {lines[0]}" if lines else "Nothing is labelled"
    sentence = (
        f"{reason}, so nothing shows whether this is better than the start. Name labels, or more "
        "of them, with monitor.labels, and their images with monitor.source where they are others."
    )
    return Verdict("unknown", None, None, None, None, None, 0, 0, sentence)


def delivered(verdict: Verdict, gate: GateRecipe) -> Choice:
    """Which network is exported: the better one, or `gate.unshown` where none is shown to be."""
    if verdict.kind == "better":
        return "continued"
    if verdict.kind == "worse":
        return "start"
    return gate.unshown


def delivery_sentence(verdict: Verdict, gate: GateRecipe) -> str:
    """What is exported, why, and where the other network is."""
    chosen = delivered(verdict, gate)
    other: Choice = "continued" if chosen == "start" else "start"
    shown = verdict.kind in ("better", "worse")
    why = "" if shown else f", as gate.unshown={gate.unshown} asks for where no difference is shown"
    return (
        f"Exported is {NAMES[chosen]}{why}. {NAMES[other].capitalize()} is in {CANDIDATES[other]}."
    )


def best_of(looks: Sequence[Look]) -> int:
    """Index of the look with the best score on the gallery; the earliest of equal ones.

    Raises:
        DataError: there is no look.
    """
    return _best([look.selection for look in looks])


def early_stop(scores: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` looks brought no new best.

    Args:
        scores: `Look.selection` of all looks so far, that before the first step included.
        patience: Looks; 0 never stops.
    """
    return patience > 0 and len(scores) > 0 and len(scores) - 1 - _best(scores) >= patience


def _best(scores: Sequence[float]) -> int:
    if not scores:
        raise DataError("There is no look to choose from. Take one first, with monitor.every.")
    return max(range(len(scores)), key=lambda index: (scores[index], -index))


def _weights(labels: np.ndarray) -> np.ndarray:
    """What makes the mean over images `(n,)` a balanced accuracy."""
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[codes])


def _expanded(units: int) -> float:
    """Level at which percentiles of so few units reach as far as a Student t interval."""
    reach = stats.t.ppf(0.5 + LEVEL / 2, units - 1) * np.sqrt(units / (units - 1))
    return float(2 * stats.norm.cdf(reach) - 1)


def _kind(low: float, high: float) -> Literal["better", "same", "worse"]:
    if low > 0:
        return "better"
    return "worse" if high < 0 else "same"


def _sentence(
    kind: str,
    difference: float,
    low: float | None,
    high: float | None,
    queries: int,
    groups: int,
    *,
    seen: bool,
) -> str:
    points = f"{100 * difference:+.1f} points"
    images = f"{queries} images" + (f" in {groups} groups" if groups < queries else "")
    # Training may have seen the images themselves, as it does without a split.
    nothing = "whose labels nothing was chosen by" if seen else "that nothing was chosen on"
    what = f"k-NN and linear probe averaged, {images} {nothing}"
    if low is None or high is None:
        return (
            f"Whether this is better than the start stays open: {points}, and over {groups} groups "
            f"of images an interval would be too short to trust ({what}). {LEAST_GROUPS} are "
            "needed: label images of more groups."
        )
    said = {
        "better": "Better than the start",
        "worse": "Worse than the start",
        "same": "No difference to the start is shown",
    }[kind]
    return f"{said}: {points} (95 % interval {100 * low:+.1f} to {100 * high:+.1f}; {what})."

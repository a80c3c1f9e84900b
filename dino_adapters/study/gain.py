"""The difference of two rows on the same draws, said in a sentence with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dino_adapters.measure.intervals import LEAST_GROUPS, paired_bootstrap, paired_interval

Interval = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Gain:
    """How much one row is above another. All numbers are shares in [-1, 1]; `x 100` is points.

    Attributes:
        row: The row in question.
        baseline: What it is compared with.
        draws: Draws behind the intervals.
        shots: Shot -> `(mean, low, high)` of the paired differences: Student t, 95 %, over draws.
            It covers the choice of support images, on these test images.
        pooled: The same for the mean over shots within a draw.
        items: `(mean, low, high)` of the pooled difference where draws and groups of test images
            are both resampled: it covers other support and other test images of the same kind.
            None where there are too few groups.
    """

    row: str
    baseline: str
    draws: int
    shots: Mapping[int, Interval]
    pooled: Interval
    items: Interval | None = None

    @property
    def helps(self) -> bool:
        """Whether both intervals are wholly above zero: on these test images, and beyond them."""
        return self._settled and min(self.pooled[1], self.items[1] if self.items else 0.0) > 0

    @property
    def hurts(self) -> bool:
        """Whether both intervals are wholly below zero."""
        return self._settled and max(self.pooled[2], self.items[2] if self.items else 0.0) < 0

    @property
    def _settled(self) -> bool:
        # Without resampled test images an interval shrinks with the number of draws alone; and
        # equal draws (every class gave all it had) give one of no width at all.
        return self.draws > 1 and self.items is not None

    def sentence(self) -> str:
        """What was found, in words a reader can quote."""
        mean, low, high = (100 * value for value in self.pooled)
        shots = _and([f"{k}" for k in self.shots])
        averaged = f"{shots} shots averaged" if len(self.shots) > 1 else f"{shots} shot"
        subject = as_start(self.row)
        if self.draws < 2:
            return (
                f"{subject} is {mean:+.1f} points from {self.baseline} ({averaged}); a single "
                "draw gives no interval."
            )
        span = f"95 % interval {low:+.1f} to {high:+.1f}; {averaged}, {self.draws} paired draws"
        if self.items is None:
            return (
                f"{subject} is {mean:+.1f} points from {self.baseline} on these test images "
                f"({span}); they are of fewer than {LEAST_GROUPS} groups, too few to say more."
            )
        if self.helps:
            said = f"{subject} beats {self.baseline} by {mean:.1f} points ({span})."
        elif self.hurts:
            said = f"{subject} falls behind {self.baseline} by {-mean:.1f} points ({span})."
        else:
            said = (
                f"{subject} and {self.baseline} cannot be told apart: {mean:+.1f} points ({span})."
            )
        _, low, high = (100 * value for value in self.items)
        return f"{said} Over other test images as well, the interval is {low:+.1f} to {high:+.1f}."

    def as_json(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "row": self.row,
            "baseline": self.baseline,
            "draws": self.draws,
            "shots": {str(k): list(values) for k, values in self.shots.items()},
            "pooled": list(self.pooled),
            "items": None if self.items is None else list(self.items),
        }


def gain(
    row: str,
    baseline: str,
    scores: Mapping[int, tuple[np.ndarray, np.ndarray]],
    correct: Mapping[int, tuple[np.ndarray, np.ndarray]],
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int = 0,
) -> Gain:
    """Compares two rows that saw the same draws and queries.

    Shots are averaged within a draw first: they share images, so a draw is one observation.

    Args:
        row: Name of the row in question.
        baseline: Name of what it is compared with.
        scores: Shot -> balanced accuracies `(draws,)` of the row and of the baseline.
        correct: Shot -> bool `(draws, queries)` of the row and of the baseline.
        labels: Class of each query.
        groups: Group of each query.
        seed: Of the resampling behind `Gain.items`.
    """
    above, below = (np.mean([pair[side] for pair in scores.values()], axis=0) for side in (0, 1))
    right, wrong = (np.mean([pair[side] for pair in correct.values()], axis=0) for side in (0, 1))
    items = None
    if len(set(groups.tolist())) >= LEAST_GROUPS:
        items = paired_bootstrap(right, wrong, groups, labels=labels, seed=seed)
    return Gain(
        row=row,
        baseline=baseline,
        draws=len(above),
        shots={shot: paired_interval(*pair) for shot, pair in scores.items()},
        pooled=paired_interval(above, below),
        items=items,
    )


def as_start(name: str) -> str:
    """A row's name at the start of a sentence: words get a capital, identifiers do not."""
    first = name.split()[0].rstrip(",")
    return name[:1].upper() + name[1:] if first.isalpha() and " " in name else name


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

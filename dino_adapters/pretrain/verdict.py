"""A verdict on two networks, and its words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dino_adapters.measure.intervals import LEAST_GROUPS
from dino_adapters.pretrain.answers import LEAST_CHANGED

Numbers = tuple[float, float | None, float | None]
"""A difference, and the ends of its interval where it has one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run's network compares with its start. Shares of 1; `x 100` is points.

    Attributes:
        kind: `better` and `worse` where the whole interval is on one side of 0; `same` where no
            difference is shown, or where two readings of the start, or the images of the verdict
            and those chosen by, disagree; `unknown` without labels or with too few groups.
        difference: Balanced accuracy now less that of the start, k-NN and linear probe averaged;
            None without labels.
        low: Lower end of its 95 % interval over other queries of the same kind, this run and the
            images that the probes learned from being as they are; None with too few groups, or
            too few that are answered otherwise.
        high: Upper end.
        knn: Balanced accuracy of the start and now; None without labels.
        linear: The same of the linear probe.
        queries: Images it was read from.
        groups: Groups that they make.
        sizes: Sides in pixels that the start and the network now were read at; None without labels.
        sentence: All of this in words.
        chosen_by: Difference, lower and upper end on the images that reading size and best look
            were chosen by; they flatter both networks.
        other: The same with the start read at another size: its best one, or that of the network
            now, whichever `sizes` does not tell; None where they are one size.
    """

    kind: Literal["better", "same", "worse", "unknown"]
    difference: float | None
    low: float | None
    high: float | None
    knn: tuple[float, float] | None
    linear: tuple[float, float] | None
    queries: int
    groups: int
    sizes: tuple[int, int] | None
    sentence: str
    chosen_by: Numbers | None = None
    other: Numbers | None = None

    @property
    def numbers(self) -> Numbers:
        """The difference, with both ends of the interval; only with labels."""
        assert self.difference is not None
        return self.difference, self.low, self.high

    def as_json(self) -> dict[str, Any]:
        """JSON-safe."""
        told = asdict(self)
        for name in ("knn", "linear", "sizes", "chosen_by", "other"):
            told[name] = None if told[name] is None else list(told[name])
        return told


def verdict_sentence(found: Verdict, changed: int, *, seen: bool) -> str:
    """The verdict in words; `changed`: groups about which the answers differ."""
    points = f"{100 * found.numbers[0]:+.1f} points"
    what = f"k-NN and linear probe averaged, {sizes_of(found)}, {images_of(found, seen=seen)}"
    if found.kind == "unknown":
        return (
            f"Whether this is better than the start stays open: {points}, and over {found.groups} "
            f"groups of images an interval would be too short to trust ({what}). {LEAST_GROUPS} "
            "are needed: label images of more groups."
        )
    if found.low is None or found.high is None:
        return (
            f"No difference to the start is shown: {points}, and only {changed} of {found.groups} "
            f"groups of images are answered otherwise, where {LEAST_CHANGED} are needed ({what})."
        )
    said = {
        "better": "Better than the start",
        "worse": "Worse than the start",
        "same": "No difference to the start is shown",
    }[found.kind]
    return f"{said}: {in_points(found.numbers, what)}."


def in_points(numbers: Numbers, what: str = "") -> str:
    """A difference in points, its interval, and what it was read from."""
    difference, low, high = numbers
    interval = "no interval"
    if low is not None and high is not None:
        interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{100 * difference:+.1f} points ({'; '.join(filter(None, (interval, what)))})"


def reading(found: Verdict) -> str:
    """What another reading of the start says."""
    assert found.sizes is not None
    return f"With the start read at {found.sizes[0]} px: {in_points(found.numbers)}."


def images_of(found: Verdict, *, seen: bool) -> str:
    """What it was read from; `seen`: training reads these images, too."""
    images = f"{found.queries} images"
    images += f" in {found.groups} groups" if found.groups < found.queries else ""
    # Training may have seen the images themselves, as it does without a split.
    return f"{images} " + (
        "whose labels nothing was chosen by" if seen else "that nothing was chosen on"
    )


def sizes_of(found: Verdict) -> str:
    """At which size, or sizes."""
    assert found.sizes is not None
    before, now = found.sizes
    return f"read at {now} px" + (f" and the start at {before} px" if before != now else "")

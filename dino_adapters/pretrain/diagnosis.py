"""What the signs of health say: a pure function from what a run noted to sentences.

Every rule compares with the start of the same run, as an untrained network looks collapsed: all its
class tokens are alike and its targets uniform. Thresholds are the named constants below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dino_adapters.pretrain.health import dead_level
from dino_adapters.pretrain.resolve import prototypes_for
from dino_adapters.pretrain.rows import PREFIX

PROBES = {"knn": "k-NN", "linear": "linear probe"}
Kind = Literal["collapse", "dead", "drop", "drift", "loose"]

NEAR_DEAD = 0.02
"""Nats below log K that still count as log K, as noise."""
NEAR_NOTHING = 0.1
"""A DINO term below this within a pass was not learned: runs that fell from 8 to 0.05 in an epoch
had constant outputs."""
UNIFORM = 0.2
"""Nats between the entropy of the teacher's rows and log K: 82 % of all prototypes in every row.
DINOv3's own start is 0.1 away. It explains a dead loss and is none: small networks that learn were
seen at 0.15."""
ALIKE = 0.98
"""Mean cosine of class tokens that cannot be told apart; untrained networks start above it."""
CLOSER = 4.0
"""So many times nearer to 1 than at the start is a collapse, and not a network's own level: tokens
after a ReLU lie at 0.8 to 0.95 and stay useful."""
FEW_DIRECTIONS = 2.0
"""RankMe of two directions; with more than some classes no useful features have so few."""
FEW_PROTOTYPES = math.log(4.0)
"""Marginal entropy of four prototypes in equal use; sets of real images were seen at some hundred,
and at two within a pass where a collapse was provoked."""
TWINS = 0.5
"""Share of prototypes with a twin from which on most of the head says nothing new. Some
duplicates are usual."""
LOOSE = 5.0
"""KoLeo of tokens whose nearest neighbours are exp(-5) = 0.007 apart; 15 is exact duplicates."""
FALLING = 0.1
"""A KoLeo that still falls by more from half to half of what is looked at comes down by itself."""
DROP = 0.05
"""Balanced accuracy below the start that says enough without an interval, and, with one, in a
single look: some hundred images are known to about 0.03."""
DRIFT = 0.1
"""Change of a mean cosine, of a correlation or of a share that is no noise of 128 images."""
LOST = 0.5
"""Share of the best agreement of similarity maps below which they are lost, whatever the class
token does: a rate that burnt trained weights took 0.81 to 0.25, healthy runs lost 0.04."""
IN_A_ROW = 2
"""Looks that must agree on a small drop or on a drift: among ten looks, one will lie below its
95 % interval by chance."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: `collapse`: all images get the same output. `dead`: the loss, or most prototypes, say
            nothing. `drop`: labelled probes fell below the start. `drift`: patches lose their
            meaning. `loose`: class tokens do not come apart.
        sentence: What was seen, what it should be, and what to try.
    """

    kind: Kind
    sentence: str

    @property
    def is_alarm(self) -> bool:
        """Whether a report puts it first; what a run does about it is up to its `Watch`."""
        return self.kind in ("collapse", "drop")


@dataclass(frozen=True, slots=True)
class History:
    """What a run noted so far; numbers that are missing or not finite are left out.

    Attributes:
        looks: Rows with `step` (steps done before the look) and signs of health, in order.
        steps: Rows with `step`, `images` (seen so far) and terms of the loss, in order.
        prototypes: K of the DINO head; 0 without one.
        rows: Global crops of a step, which Sinkhorn-Knopp balances together.
        images: How many the run reads; 0 if that is not known.
        frozen_until: First step that moves the backbone.
    """

    looks: Sequence[Mapping[str, float]]
    steps: Sequence[Mapping[str, float]]
    prototypes: int
    rows: int
    images: int
    frozen_until: int

    @property
    def start(self) -> Mapping[str, float]:
        """The first look."""
        return self.looks[0] if self.looks else {}

    @property
    def moved(self) -> Sequence[Mapping[str, float]]:
        """Looks at a network that training has changed."""
        return [look for look in self.looks[1:] if look["step"] > self.frozen_until]

    @property
    def last(self) -> Mapping[str, float]:
        """The last look at a network that training has changed; empty before."""
        return self.moved[-1] if self.moved else {}

    @property
    def settled(self) -> Sequence[Mapping[str, float]]:
        """The last third of the steps that moved the backbone; none within the first pass."""
        done = [row for row in self.steps if "images" in row]
        free = [row for row in done if row["step"] >= self.frozen_until]
        if not free or free[-1]["images"] - free[0]["images"] < self.images:
            return []
        first, last = free[0]["step"], free[-1]["step"]
        return [row for row in free if row["step"] >= last - (last - first) / 3]

    def change(self, sign: str) -> tuple[float, float] | None:
        """A sign at the start and in the last look, if both have it."""
        if sign not in self.start or sign not in self.last:
            return None
        return self.start[sign], self.last[sign]


def diagnose(
    looks: Sequence[Mapping[str, float]],
    steps: Sequence[Mapping[str, float]],
    *,
    prototypes: int,
    rows: int,
    images: int,
    frozen_until: int,
) -> tuple[Finding, ...]:
    """What is wrong with a run, as far as it got, the worst first.

    Signs: those of `health.look_at`; of labelled probes `knn` and `linear` (balanced accuracies),
    and `gain`, `gain_low`, `gain_high` (both averaged, less the start, with its 95 % interval).
    Names may carry `watch/` before them. The rules follow from the losses (arXiv 2508.10104) and
    from what users of DINOv2 and DINOv3 reported.

    Args:
        looks: the looks in order, the first before the first step.
        steps: the ordinary rows in order; those of skipped steps may be among them.
        prototypes: K of the DINO head; 0 without one.
        rows: global crops of a step, over all devices and micro-batches.
        images: how many the run reads; 0 if not known: then no rule waits for the first pass.
        frozen_until: first step that moves the backbone.
    """
    seen, done = ([r for r in map(_numbers, held) if "step" in r] for held in (looks, steps))
    history = History(seen, done, prototypes, rows, images, frozen_until)
    rules = (_collapse, _drop, _dead, _twins, _loose, _drift)  # the worst first
    return tuple(finding for rule in rules for finding in rule(history))


def _collapse(run: History) -> Iterator[Finding]:
    """All images get the same output."""
    seen = []
    for row in run.steps:
        term = row.get("dino_global", math.inf)
        if term < NEAR_NOTHING and row.get("images", math.inf) <= run.images:
            seen.append(f"the DINO term fell to {term:.2f} within the first pass, far too soon")
            break
    if cosine := run.change("cls_cosine"):
        start, now = cosine
        if now > ALIKE and (1 - now) * CLOSER < 1 - start:
            seen.append(
                f"the mean cosine of class tokens of different images is {now:.3f} ({start:.3f} "
                "at the start; it should stay well below 1)"
            )
    if rank := run.change("rankme"):
        start, now = rank
        if now < FEW_DIRECTIONS and now < start / 2:
            seen.append(
                f"RankMe is {now:.1f} ({start:.1f} at the start; features should fill many "
                "directions)"
            )
    if marginal := run.change("marginal_entropy"):
        start, now = marginal
        if now < FEW_PROTOTYPES and now < start / 2:  # Sinkhorn-Knopp hides a biased head's start
            seen.append(
                f"{_effective(now)} in effective use for all images (marginal entropy {now:.2f}; "
                f"it should come near log K = {dead_level(run.prototypes):.2f})"
            )
    if seen:
        yield Finding(
            "collapse",
            f"All images get nearly the same output: {'; '.join(seen)}. Try a third of optim.lr, a "
            "longer schedule.freeze_backbone, or objective.centering=sinkhorn if it is off.",
        )


def _dead(run: History) -> Iterator[Finding]:
    """The DINO term stands at log K, or the targets are uniform."""
    if not run.prototypes:
        return
    level = dead_level(run.prototypes)
    terms = [
        value
        for name in ("dino_global", "dino_local")
        if (value := _mean(run.settled, name)) is not None
    ]
    stuck = bool(terms) and min(terms) > level - NEAR_DEAD
    entropy = run.last.get("row_entropy", 0.0) if run.settled else 0.0
    uniform = entropy > level - UNIFORM
    if not stuck and (terms or not uniform):
        return  # a term that falls learns, however slowly the teacher sharpens
    seen = []
    if stuck:
        seen.append(
            f"The DINO term stood at {min(terms):.2f} over the last third of the steps, where a "
            f"student that knows nothing stands (log K = {level:.2f}, K = {run.prototypes:,})"
        )
    if uniform:
        seen.append(
            f"The teacher spreads each image over all prototypes (entropy {entropy:.2f}, which "
            f"should be well below log K = {level:.2f})"
        )
    tries = [f"objective.prototypes={fewer}, "] if (fewer := _fewer(run)) else []
    if uniform:
        tries.append("objective.prototype_norm=1 if it is unset, ")
    tries.append("a lower objective.teacher_temperature, a lower optim.lr or more steps")
    yield Finding("dead", f"{'. '.join(seen)}. Try {''.join(tries)}.")


def _twins(run: History) -> Iterator[Finding]:
    """Most prototypes coincide with another one."""
    duplicated = run.change("prototypes_duplicated")
    if duplicated is None or duplicated[1] <= max(TWINS, duplicated[0] + DRIFT):
        return  # narrow heads are crowded from the start
    start, now = duplicated
    fewer = f"objective.prototypes={_fewer(run)}" if _fewer(run) else "fewer objective.prototypes"
    yield Finding(
        "dead",
        f"{100 * now:.0f} % of the {run.prototypes:,} prototypes have a twin ({100 * start:.0f} % "
        f"at the start; most should stand alone). Try {fewer}, or a longer "
        "schedule.freeze_last_layer.",
    )


def _loose(run: History) -> Iterator[Finding]:
    """Class tokens do not come apart."""
    half = len(run.settled) // 2
    before, value = _mean(run.settled[:half], "koleo"), _mean(run.settled[half:], "koleo")
    if before is not None and value is not None and value >= max(LOOSE, before - FALLING):
        yield Finding(
            "loose",
            f"KoLeo stays at {value:.1f}: class tokens of nearest neighbours are almost equal, and "
            "come no further apart (it should fall to about 0). Look for duplicates among "
            "the images; if there are none, try a larger objective.regularizer_weight or more "
            "steps.",
        )


def _drop(run: History) -> Iterator[Finding]:
    """Labelled probes are below those before the first step."""
    start, now = run.start, run.last
    highs = [look["gain_high"] for look in run.moved[-IN_A_ROW:] if "gain_high" in look]
    probes = [name for name in PROBES if run.change(name)]
    if {"gain", "gain_low", "gain_high"} <= now.keys():
        fell = highs[-1] < -DROP or (len(highs) == IN_A_ROW and max(highs) < 0)
        span = f"95 % interval {100 * now['gain_low']:+.1f} to {100 * now['gain_high']:+.1f}"
        seen = f"{100 * now['gain']:+.1f} points from the start ({span})"
    elif probes and "gain" not in now:  # a gain without an interval: too few images to say more
        fell = sum(now[name] - start[name] for name in probes) < -DROP * len(probes)
        seen = ", ".join(
            f"{PROBES[name]} {100 * now[name]:.1f} % ({100 * start[name]:.1f} % at the start)"
            for name in probes
        )
    else:
        return
    if fell:
        yield Finding(
            "drop",
            f"Features became worse for the labelled images: {seen}. Try a third of optim.lr, a "
            "longer schedule.freeze_backbone and backbone_ramp, or anchor and gram with "
            "gram.teacher=start.",
        )


def _drift(run: History) -> Iterator[Finding]:
    """Class tokens move towards their patches, while patches lose their pattern."""
    signs = ("cls_patch_cosine", "patch_consistency")
    # Until its class tokens came apart, a network from random weights has nothing to lose.
    own = [run.start, *run.moved]
    apart = [look for look in own if look.get("cls_cosine", 0.0) <= ALIKE]
    looks = [look for look in apart if all(sign in look for sign in signs)]
    if len(looks) <= IN_A_ROW:
        return
    best = max(looks[:-IN_A_ROW], key=lambda look: look["patch_consistency"])
    agreed, now = best["patch_consistency"], looks[-1]
    drifted = all(
        (
            look["patch_consistency"] < agreed - DRIFT
            and look["cls_patch_cosine"] > best["cls_patch_cosine"] + DRIFT
        )
        or look["patch_consistency"] < LOST * agreed
        for look in looks[-IN_A_ROW:]
    )
    if drifted and now["step"] == run.last["step"]:
        yield Finding(
            "drift",
            f"Patches lose their own meaning: since step {best['step']:.0f} the agreement of an "
            f"image's similarity map with its mirror image's fell from {agreed:.2f} to "
            f"{now['patch_consistency']:.2f} (it should hold), and their cosine with the class "
            f"token went from {best['cls_patch_cosine']:.2f} to {now['cls_patch_cosine']:.2f}. Try "
            "Gram anchoring (gram.teacher=ema, or start for trained weights), a lower optim.lr or "
            "fewer steps.",
        )


def _effective(marginal: float) -> str:
    count = math.exp(marginal)
    return "one prototype is" if count < 1.5 else f"{count:.1f} prototypes are"


def _fewer(run: History) -> int | None:
    """A K that so many images and rows can tell apart, where that is less than now."""
    if run.rows < 1:
        return None
    # Not knowing the images, the rule for few is the careful one.
    advised = prototypes_for(run.images or run.prototypes, run.rows)
    return advised if advised < run.prototypes else None


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Mean of a term over the rows that have it, at least three."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if len(values) >= 3 else None


def _numbers(row: Mapping[str, float]) -> dict[str, float]:
    """Finite numbers of a row, without the prefix of looks; a file holds null for NaN."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }

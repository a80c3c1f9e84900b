"""Schedules as tables: one value for each step, from pure functions.

`warmup_cosine` is the family of DINOv3, `cosine_table` and `linear_rise` are those of DINO and
DINOv2. They differ at the edges: a rise of W steps reaches its end in step W or in step W - 1, and
a cosine reaches its end in its last step or one step after it.
"""

from __future__ import annotations

import math
from typing import Literal

from dino_adapters.contracts import RecipeError


def warmup_cosine(
    steps: int, *, start: float, peak: float, end: float, warmup: int, cosine: int | None = None
) -> list[float]:
    """Linear rise from `start`, half a cosine from `peak` to `end`, then `end` (DINOv3).

    The rise stops short of `peak`, which is the first value of the cosine; `end` is its last. A
    cosine of one step is `peak`, one of none a jump. A `peak` below `end` rises as a cosine.

    Args:
        steps: length of the table.
        start: first value of the rise.
        peak: value at step `warmup`.
        end: value of the last step, where the cosine has at least two.
        warmup: steps of the rise.
        cosine: steps of the cosine; None takes all that are left.

    Raises:
        RecipeError: the parts do not fit into `steps`, or a count is negative.
    """
    cosine = steps - warmup if cosine is None else cosine
    _check_fits(steps, warmup=warmup, cosine=cosine)
    table = [start + (peak - start) * step / warmup for step in range(warmup)]
    table += [half_cosine(step, cosine - 1, peak, end) for step in range(cosine)]
    return table + [end] * (steps - warmup - cosine)


def cosine_table(
    steps: int,
    *,
    base: float,
    end: float,
    warmup: int = 0,
    warmup_start: float = 0.0,
    frozen: int = 0,
    extra: float = 0.0,
) -> list[float]:
    """Zeros, a linear rise to `base`, then half a cosine towards `end` (DINO, DINOv2).

    The rise ends at `base`, so that it comes twice. The cosine would reach `end` one step after
    the table, where the schedule stays from then on. With `extra` it is the start of a cosine that
    is longer by this share, stretched so that its last value is `end`.

    Args:
        steps: length of the table.
        base: value after the rise.
        end: value that the cosine goes to.
        warmup: steps of the rise, both ends included; a rise of one step is `warmup_start`.
        warmup_start: first value of the rise.
        frozen: zeros before the rise.
        extra: share of the cosine that is cut off, 0 for none.

    Raises:
        RecipeError: the parts do not fit into `steps`, or a count or `extra` is negative.
    """
    _check_fits(steps, frozen=frozen, warmup=warmup)
    if extra < 0.0:
        raise RecipeError(f"extra is {extra}. Give 0 for the whole cosine, or a positive share.")
    table = [0.0] * frozen + linear_rise(warmup, warmup, warmup_start, base)
    count = steps - len(table)
    if not extra:
        return table + [half_cosine(step, count, base, end) for step in range(count)]
    last = int((1 + extra) * count) - 1
    shares = [half_cosine(step, last, 1.0, 0.0) for step in range(count)]
    low = shares[-1] if count > 1 else 0.0
    return table + [end + (base - end) * (share - low) / (1.0 - low) for share in shares]


def linear_rise(rise: int, steps: int, start: float, end: float) -> list[float]:
    """From `start` to `end` over `rise` steps, both included, then `end` up to `steps`.

    Args:
        rise: steps of the rise; one alone is `start`. Those beyond `steps` are cut off.
        steps: length of the table.
        start: first value.
        end: last value of the rise.
    """
    table = [start + (end - start) * step / max(rise - 1, 1) for step in range(rise)]
    return (table + [end] * (steps - rise))[:steps]


def frozen_start(table: list[float], steps: int) -> list[float]:
    """The table with zeros in its first steps: the prototypes' rate while they are frozen."""
    frozen = min(steps, len(table))
    return [0.0] * frozen + table[frozen:]


def scaled_rate(lr: float, batch: int, rule: Literal["none", "sqrt_1024", "linear_256"]) -> float:
    """The learning rate for a batch; in DINOv3's schedules for peak and end, not for the start.

    Args:
        lr: the number in the recipe.
        batch: images of one step on all devices.
        rule: `sqrt_1024` is DINOv3's `4 * sqrt(batch / 1024)`, of which DINOv2 has no factor 4;
            `linear_256` is DINO's `batch / 256`; `none` takes `lr` as it is.
    """
    if rule == "sqrt_1024":
        return lr * 4.0 * math.sqrt(batch / 1024)
    return lr * batch / 256 if rule == "linear_256" else lr


def half_cosine(step: int, last: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` from step `last` on; `start` if that is step 0 as well."""
    progress = min(step / max(last, 1), 1.0)
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _check_fits(steps: int, **parts: int) -> None:
    named = " and ".join(f"{name} {count}" for name, count in parts.items())
    if min(steps, *parts.values()) < 0 or sum(parts.values()) > steps:
        raise RecipeError(
            f"A schedule has {steps} steps, with {named}. Give counts of at least 0 that add up to "
            "no more than the steps."
        )

"""What to do about what `inspect` found: sentences for people, with the settings they need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from dino_adapters.data.units import range_hint

if TYPE_CHECKING:
    from dino_adapters.data.audit import Look
    from dino_adapters.data.source import ImageSource

MOST_UNREADABLE = 0.1  # what recipes allow unless they say otherwise
_MOST_NAMED = 3


def value_ranges(looks: Sequence[Look]) -> dict[str, tuple[float, float]]:
    """Least and greatest valid value of each dtype."""
    found: dict[str, tuple[float, float]] = {}
    for look in looks:
        if look.seen:
            low, high = found.get(look.dtype, (look.low, look.high))
            found[look.dtype] = (min(low, look.low), max(high, look.high))
    return dict(sorted(found.items()))


def suggest(
    source: ImageSource,
    looks: Sequence[Look],
    classes: Mapping[str, int],
    *,
    exact: int,
    near: int,
) -> list[str]:
    """Settings and warnings, as sentences.

    Args:
        source: The images.
        looks: What each image left behind; at least one was readable.
        classes: Class and number of images, most frequent first; empty without labels.
        exact: Sets of equal files.
        near: Pairs that look alike.
    """
    good = [look for look in looks if not look.trouble]
    said = _on_unreadable(looks)
    said.extend(_on_units(good))
    side = int(np.median([min(look.width, look.height) for look in good]))
    tiny = sum(min(look.width, look.height) < 16 for look in good)
    if tiny:
        said.append(f"{tiny} images have a side below 16 pixels, less than most networks' patch.")
    if side > 256:
        said.append(
            f"The median shorter side is {side} pixels. If crops are below 256 pixels, "
            "data.image_size=256 reads no more than training needs."
        )
    said.extend(_on_labels(source, classes))
    if exact:
        said.append(
            f"Files that are equal byte for byte: {exact} sets. Remove the copies, or give "
            "them one group, so that no copy of a training image is tested on."
        )
    if near:
        said.append(
            f"Pairs that look nearly alike: {near}. Give the images of one place, series or "
            "upload one group before splitting."
        )
    return said


def _on_unreadable(looks: Sequence[Look]) -> list[str]:
    bad = [look.key for look in looks if look.trouble]
    if not bad:
        return []
    share = len(bad) / len(looks)
    found = f"{len(bad)} of {len(looks)} images cannot be used ({_some(bad)})"
    if share > MOST_UNREADABLE:
        # Two decimals, upwards: the setting must allow what was found.
        allowed = min(math.ceil(100 * share), 100) / 100
        return [
            f"{found}, which is {100 * share:.0f} %. Runs stop above {100 * MOST_UNREADABLE:.0f} "
            f"%: remove them, or set data.max_unreadable={allowed:g}."
        ]
    return [f"{found}; a run that meets them skips, counts and names them."]


def _on_units(good: Sequence[Look]) -> list[str]:
    said = []
    bare = [look for look in good if not look.ranged]
    for dtype, (low, high) in value_ranges(bare).items():
        said.append(
            f"The {dtype} images hold values from {low:g} to {high:g}, and nothing says which mean "
            f"0 and 1. {range_hint(dtype, low, high)}"
        )
    numbered = {look.bands for look in good if look.bands[0] == "band1"}
    for bands in sorted(numbered):
        said.append(
            f"Files with {len(bands)} channels do not name them; they are called {bands[0]} to "
            f"{bands[-1]} unless you do. Weights and images are matched by name, so name them to "
            f"use weights made elsewhere: data.bands=[...] with {len(bands)} names in the file's "
            "order (for commands: --bands NAME,NAME,...)."
        )
    kinds = {look.bands for look in good}
    if len(kinds) > 1:
        said.append(
            "The images differ in their bands. Split them into several data sets, unless the "
            "difference is only grey among RGB."
        )
    return said


def _on_labels(source: ImageSource, classes: Mapping[str, int]) -> list[str]:
    if not classes:
        folders = {PurePosixPath(key).parent.name for key in source.keys}
        if 1 < len(folders) <= 200 and "" not in folders:
            return [
                f"No labels were given. If the {len(folders)} folders are classes, set "
                "data.labels=folder (for commands: --labels folder)."
            ]
        return []
    said = []
    if len(classes) == 1:
        said.append(
            f"There is only one class ({next(iter(classes))}): fit, evaluate and start need two "
            "classes or more."
        )
    single = [name for name, count in classes.items() if count == 1]
    if len(single) == 1:
        said.append(
            f"The class {single[0]} has a single image: it can only train, it is never tested. "
            "Collect more, or leave the class out."
        )
    elif single:
        said.append(
            f"{len(single)} classes have a single image ({_some(single)}): it can only train, it "
            "is never tested. Collect more, or leave these classes out."
        )
    most, least = max(classes.values()), min(classes.values())
    if most >= 10 * least:
        rare = [name for name, count in classes.items() if count * 10 <= most]
        said.append(
            f"The classes are long-tailed ({most} to {least} images; rare: "
            f"{', '.join(rare[-3:])}). Judge by balanced accuracy and recall per class."
        )
    if not source.groups:
        said.append(
            "No groups were given. If several images show one place, patient or series, add a "
            "column group: a split that divides them flatters."
        )
    return said


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

"""Few-shot draws: the same number of images of every class, nested, spread over groups."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dino_adapters.contracts import DataError
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import write_json

FEWER = "classes with fewer images than shots, which give all they have"


def draw_shots(
    keys: Sequence[str],
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    *,
    shots: Sequence[int] = (1, 3, 5),
    seed: int,
    draw: int = 0,
    notices: Notices | None = None,
) -> dict[int, tuple[str, ...]]:
    """Draws k images of every class, for each k.

    A class's images are put in one drawn order and k of them are its first k, so every smaller
    draw is part of every larger one. In that order all groups come once before any comes twice:
    two images of one place or patient tell less than two of different ones.

    Args:
        keys: Images to draw from (the training part); their order does not matter.
        labels: Class of each key; unlabelled keys are left out.
        groups: Group of each key that has one; a key without one is its own group.
        shots: Numbers of images per class.
        seed: Seed of the run.
        draw: Number of the draw; each gives other images.
        notices: Counts classes with fewer than k images.

    Returns:
        For each k, keys by class (sorted) and drawn order.

    Raises:
        DataError: no key has a label, or a k below 1.
    """
    if not shots or min(shots) < 1:
        raise DataError(f"shots is {list(shots)}. Give one or more numbers from 1 on.")
    classes: dict[str, list[str]] = defaultdict(list)
    for key in sorted(set(keys)):
        if key in labels:
            classes[labels[key]].append(key)
    if not classes:
        raise DataError("None of the images to draw from has a label. Give data.labels.")
    orders = {name: _order(classes[name], groups, seed, name, draw) for name in sorted(classes)}
    drawn: dict[int, tuple[str, ...]] = {}
    for count in sorted(set(shots)):
        drawn[count] = tuple(key for order in orders.values() for key in order[:count])
        for name, order in orders.items():
            if len(order) < count and notices is not None:
                notices.add(FEWER, f"{name} has {len(order)} of {count}")
    return drawn


def write_shots(path: Path, draws: Sequence[Mapping[int, Sequence[str]]], *, seed: int) -> None:
    """Writes draws as lists of keys, which reproduce a result without this package."""
    content = [{str(count): list(keys) for count, keys in draw.items()} for draw in draws]
    write_json(path, {"seed": seed, "draws": content})


def read_shots(path: Path) -> list[dict[int, tuple[str, ...]]]:
    """Draws as `write_shots` wrote them.

    Raises:
        DataError: the file is absent or of another layout.
    """
    try:
        draws = json.loads(path.read_text(encoding="utf-8"))["draws"]
        return [{int(count): tuple(keys) for count, keys in draw.items()} for draw in draws]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no few-shot draws ({error}). Draw them again.") from error


def _order(
    keys: Sequence[str], groups: Mapping[str, str], seed: int, name: str, draw: int
) -> list[str]:
    """A drawn order of one class's keys in which groups take turns."""
    from dino_adapters.runtime.chance import numpy_generator  # here: it brings torch

    # Each class has its own stream: a class more or less leaves the others' draws alone.
    chance = numpy_generator(seed, f"shots/{name}", draw)
    members: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for key in keys:
        # The flag keeps a key without a group apart from a group of the same name.
        members[key in groups, groups.get(key, key)].append(key)
    turns = [members[group] for group in sorted(members)]
    chance.shuffle(turns)
    for turn in turns:
        chance.shuffle(turn)
    longest = max(len(turn) for turn in turns)
    return [turn[at] for at in range(longest) for turn in turns if at < len(turn)]

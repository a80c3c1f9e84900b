"""Train, validation and test parts: grouped, stratified, written down and checked for leaks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dino_adapters.contracts import DataError, SplitLeakError
from dino_adapters.data.labels import read_table
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import json_digest, write_json
from dino_adapters.runtime.lookup import nearest

PARTS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Split:
    """Three parts without a common image or group, made once and written down.

    Attributes:
        train: Keys to learn from, sorted.
        val: Keys to choose settings on.
        test: Keys to report on.
        seed: Seed it was drawn with; None for a split made by someone else.
        rule: How it was made, in words.
        digest: Digest of the three parts.
        groups: Group of each key that has one; no group is in two parts.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    seed: int | None
    rule: str
    digest: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sorts the parts, refuses a leak, and fills in the digest."""
        for part in PARTS:
            object.__setattr__(self, part, tuple(sorted(getattr(self, part))))
        object.__setattr__(self, "groups", dict(self.groups))
        parts = {part: getattr(self, part) for part in PARTS}
        check_leaks(parts, self.groups)
        found = json_digest({part: list(keys) for part, keys in parts.items()})
        if self.digest and self.digest != found:
            raise DataError(
                "The split was changed after it was written: its digest is not that of its parts. "
                "Restore the file, or take the line 'digest' out to accept it as it is."
            )
        object.__setattr__(self, "digest", found)


def check_leaks(parts: Mapping[str, Collection[str]], groups: Mapping[str, str]) -> None:
    """Refuses an image or a group that is in two parts, or an image that is in one part twice.

    Raises:
        SplitLeakError: the message names the parts and the first cases.
    """
    home: dict[tuple[str, str], str] = {}
    shared: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for part, keys in parts.items():
        for key, times in Counter(keys).items():
            if times > 1:
                shared["image", part, part].append(key)
            other = home.setdefault(("image", key), part)
            if other != part:
                shared["image", other, part].append(key)
            if key in groups:
                other = home.setdefault(("group", groups[key]), part)
                if other != part and groups[key] not in shared["group", other, part]:
                    shared["group", other, part].append(groups[key])
    for (what, first, second), names in shared.items():
        if names:
            raise SplitLeakError(
                f"{len(names)} {what}{'s' if len(names) > 1 else ''} of the part '{first}' "
                f"{'are' if len(names) > 1 else 'is'} in '{second}', too (e.g. "
                f"{', '.join(names[:3])}), so results on it would flatter. Keep each image and "
                "each group in one part, once."
            )


def make_split(
    keys: Sequence[str],
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    *,
    seed: int,
    val: float = 0.2,
    test: float = 0.3,
    notices: Notices | None = None,
) -> Split:
    """Deals whole groups to three parts so that each class keeps its shares as far as it can.

    The largest groups are dealt first, each to the part whose classes lack most; groups of one
    size come in an order drawn from the seed. The order of `keys` does not matter.

    Args:
        keys: Images; those without a group are a group of their own.
        labels: Class of each labelled key; unlabelled ones count as one more class.
        groups: Group of each key that has one.
        seed: Same seed, same split.
        val: Share of images for validation, 0 to leave it out.
        test: Share of images for the test, 0 to leave it out.
        notices: Counts classes that a part had to do without.

    Raises:
        DataError: impossible shares, or fewer groups than parts.
    """
    shares = {"train": 1.0 - val - test, "val": val, "test": test}
    if min(val, test) < 0.0 or shares["train"] <= 0.0:
        raise DataError(
            f"The split's shares are val {val} and test {test}. Give two shares of 0 or more that "
            "leave something for training."
        )
    wanted = [part for part in PARTS if shares[part] > 0.0]
    members: dict[str, list[str]] = defaultdict(list)
    for key in sorted(set(keys)):
        # The mark keeps a key without a group apart from a group of the same name.
        members[f"group/{groups[key]}" if key in groups else f"image/{key}"].append(key)
    if len(members) < len(wanted):
        raise DataError(
            f"{len(members)} groups cannot be split into {', '.join(wanted)}. Collect images of "
            "more places, patients or sites, or give a split of your own."
        )
    dealt = _deal(members, labels, [shares[part] for part in wanted], seed)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name, at in dealt.items():
        parts[wanted[at]].extend(members[name])
    _note_absent(parts, wanted, labels, notices)
    used = {key: groups[key] for key in sorted(set(keys)) if key in groups}
    rule = f"whole groups, stratified by class; val {val:g}, test {test:g}, seed {seed}"
    train_keys, val_keys, test_keys = (tuple(parts[part]) for part in PARTS)
    return Split(train_keys, val_keys, test_keys, seed, rule, groups=used)


def write_split(path: Path, split: Split) -> None:
    """Writes a split as JSON, whole or not at all."""
    content = {
        "splits": {part: list(getattr(split, part)) for part in PARTS},
        "groups": dict(split.groups),
        "seed": split.seed,
        "rule": split.rule,
        "digest": split.digest,
    }
    write_json(path, content)


def read_split(path: Path, *, keys: Collection[str] | None = None, train: str = "train") -> Split:
    """A split from a file: `write_split`'s JSON, the same layout by others, or a table.

    Args:
        path: JSON `{"splits": {"train": [...], "val": [...], "test": [...]}, "groups": {...}}`,
            or a CSV with the columns `path`, `split` and optionally `group`.
        keys: The images that are there; the split may not name others.
        train: Part to train on, where a file offers several.

    Raises:
        DataError: another layout, a part is absent, or it names images that are not there.
        SplitLeakError: an image or a group is in two parts.
    """
    seed, rule, digest = None, f"read from {path.name}", ""
    if path.suffix.lower() == ".csv":
        rows = read_table(path, needed=("split",))
        parts: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            parts[row["split"].strip()].append(row["path"])
        groups = {row["path"]: row["group"].strip() for row in rows if row.get("group", "").strip()}
    else:
        parts, groups, content = _read_json(path)
        if train == "train":
            seed, digest = content.get("seed"), content.get("digest") or ""
            rule = content.get("rule") or rule
    if train != "train":
        rule = f"{rule}, trained on '{train}'"
    for part in (train, "test"):
        if not parts.get(part):
            raise DataError(f"{path} has no part '{part}'. {nearest(part, parts)}")
    train_keys, val_keys, test_keys = (
        tuple(parts.get(part, ())) for part in (train, "val", "test")
    )
    split = Split(train_keys, val_keys, test_keys, seed, rule, digest, groups)
    if keys is not None:
        known = set(keys)
        gone = [key for part in PARTS for key in getattr(split, part) if key not in known]
        if gone:
            raise DataError(
                f"{path} names {len(gone)} images that are not in the data, e.g. "
                f"{', '.join(gone[:3])}. Keys are paths relative to data.source."
            )
    return split


def read_splits_json(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """All parts and the groups of a JSON file `{"splits": {name: [...]}, "groups": {...}}`.

    Raises:
        DataError: the file is absent or of another layout.
    """
    parts, groups, _ = _read_json(path)
    return {name: tuple(keys) for name, keys in parts.items()}, groups


def _read_json(path: Path) -> tuple[dict[str, list[str]], dict[str, str], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = {str(name): [str(key) for key in keys] for name, keys in content["splits"].items()}
        groups = {str(key): str(group) for key, group in content.get("groups", {}).items()}
    except FileNotFoundError as error:
        raise DataError(f"There is no split {path}. Give a JSON or CSV file.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no split ({type(error).__name__}: {error}). Write it as "
            '{"splits": {"train": [...], "val": [...], "test": [...]}, "groups": {...}}.'
        ) from error
    return parts, groups, content


def _deal(
    members: Mapping[str, Sequence[str]],
    labels: Mapping[str, str],
    shares: Sequence[float],
    seed: int,
) -> dict[str, int]:
    """Group name -> number of its part."""
    from dino_adapters.runtime.chance import numpy_generator  # here: it brings torch

    classes = sorted({labels.get(key, "") for keys in members.values() for key in keys})
    column = {name: at for at, name in enumerate(classes)}
    counts = {name: np.zeros(len(classes)) for name in sorted(members)}
    for name, vector in counts.items():
        for key in members[name]:
            vector[column[labels.get(key, "")]] += 1
    totals = np.sum(list(counts.values()), axis=0)
    targets = np.outer(shares, totals)
    have = np.zeros_like(targets)
    drawn = list(counts)
    numpy_generator(seed, "split").shuffle(drawn)
    drawn.sort(key=lambda name: -len(members[name]))  # stable: ties stay in drawn order
    dealt: dict[str, int] = {}
    for name in drawn:
        vector = counts[name]
        # Change of the squared distance to the targets, each class by its own size; a share's
        # own size breaks ties, so that the larger part takes a lone group.
        change = ((vector * (2 * (have - targets) + vector)) / np.maximum(totals, 1)).sum(axis=1)
        at = min(range(len(shares)), key=lambda part: (round(change[part], 9), -shares[part]))
        dealt[name] = at
        have[at] += vector
    for part in range(len(shares)):
        _fill(part, dealt, members)
    return dealt


def _fill(part: int, dealt: dict[str, int], members: Mapping[str, Sequence[str]]) -> None:
    """Gives an empty part the smallest group of the part that has most groups."""
    sizes = Counter(dealt.values())
    if sizes[part]:
        return
    richest = max(sizes, key=lambda other: (sizes[other], -other))
    spare = (name for name, at in dealt.items() if at == richest)
    dealt[min(spare, key=lambda name: (len(members[name]), name))] = part


def _note_absent(
    parts: Mapping[str, Sequence[str]],
    wanted: Sequence[str],
    labels: Mapping[str, str],
    notices: Notices | None,
) -> None:
    if notices is None:
        return
    classes = {labels[key] for keys in parts.values() for key in keys if key in labels}
    for part in wanted:
        for name in sorted(classes - {labels.get(key) for key in parts[part]}):
            notices.add(f"classes with too few groups to be in the part '{part}'", name)

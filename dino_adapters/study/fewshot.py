"""How well few labels do: k-shot accuracy of several rows of vectors on the same draws.

Every row (a network, or a simple floor) sees the same support images and the same queries, so that
two rows can be compared draw by draw. Test images enter only in the last line: nothing is fitted,
centred or chosen on them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import dino_adapters.heads  # noqa: F401  (its import registers the heads)
from dino_adapters.contracts import DataError, ShapeError
from dino_adapters.data.shots import draw_shots
from dino_adapters.measure.metrics import balanced_accuracy
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.lookup import HEADS, find
from dino_adapters.study.shot_table import FewShotTable

if TYPE_CHECKING:
    from dino_adapters.data.splits import Split


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """The size a network is read at, and the validation accuracy of each size tried."""

    size: int
    scores: Mapping[int, float]


def evaluate_shots(
    vectors: Mapping[str, np.ndarray],
    keys: Sequence[str],
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    split: Split,
    *,
    shots: Sequence[int] = (1, 3, 5),
    draws: int = 10,
    seed: int = 0,
    head: str = "ncm",
    head_options: Mapping[str, Any] | None = None,
    standardised: Collection[str] = (),
    part: str = "test",
) -> FewShotTable:
    """Fits `head` on k labelled images of each class and asks it for every query, many times.

    Args:
        vectors: Row name -> `(n, D)` finite vectors, aligned with `keys`; D may differ by row.
        keys: n sample keys; they must hold all keys of `split.train` and of `part`.
        labels: Key -> class. Training images without a label are part of the unlabelled pool.
        groups: Key -> group; a missing key is its own group.
        split: Support images come from `train`.
        shots: Support images of a class; the draws are nested (the 1-shot image is in 3-shot).
        draws: Sets of support images.
        seed: Decides the draws, together with nothing else.
        head: Registered head. `ncm` is centred on the mean of the whole training pool, which
            needs no labels (SimpleShot, arXiv 1911.04623).
        head_options: Further keywords of the head.
        standardised: Rows divided by the pool's standard deviation, for numbers of unlike units.
        part: `test`, or `val` for choices.

    Raises:
        DataError: a part is empty, keys have no vector, or queries have no label.
        ShapeError: a row does not fit the keys, or is not finite.
    """
    at = {key: index for index, key in enumerate(keys)}
    queries = split.val if part == "val" else split.test
    _check(vectors, at, queries, labels, split, part)
    supply = [key for key in split.train if key in labels]
    counts = tuple(sorted(set(shots)))
    support = tuple(
        draw_shots(supply, labels, groups, shots=counts, seed=seed, draw=index)
        for index in range(draws)
    )
    truth = np.array([labels[key] for key in queries])
    query_rows = np.array([at[key] for key in queries])
    pool_rows = np.array([at[key] for key in split.train])
    scores: dict[str, dict[int, np.ndarray]] = {}
    correct: dict[str, dict[int, np.ndarray]] = {}
    for row, values in vectors.items():
        x = np.asarray(values, dtype=np.float32)
        pool = x[pool_rows]
        if row in standardised:
            x = _standardise(x, pool)
            pool = x[pool_rows]
        options = dict(head_options or {})
        if head == "ncm":
            options.setdefault("centre", pool.mean(axis=0, dtype=np.float64))
        scores[row], correct[row] = {}, {}
        for shot in counts:
            answers = np.stack(
                [_answer(head, options, x, at, draw[shot], labels, query_rows) for draw in support]
            )
            scores[row][shot] = np.array([balanced_accuracy(truth, one) for one in answers])
            correct[row][shot] = answers == truth
    return FewShotTable(
        shots=counts,
        scores=scores,
        support=support,
        correct=correct,
        query_labels=truth,
        query_groups=np.array([groups.get(key, key) for key in queries]),
        part=part,
        head=head,
        seed=seed,
        notes=_notes(supply, labels, truth, max(shots)),
    )


def best_size(
    candidates: Mapping[int, np.ndarray],
    keys: Sequence[str],
    labels: Mapping[str, str],
    groups: Mapping[str, str],
    split: Split,
    *,
    shots: Sequence[int] = (1, 3, 5),
    draws: int = 10,
    seed: int = 0,
    head: str = "ncm",
) -> SizeChoice:
    """The reading size that suits a network best, by its few-shot accuracy on validation images.

    A network continued at one size and read at another is judged unfairly, so every network is
    read at its own best size. The test images have no part in this. Equal scores: the smaller.

    Args:
        candidates: Size in pixels -> `(n, D)` vectors of one network read at that size.
        keys: As in `evaluate_shots`, like all that follow.
        labels: Key -> class.
        groups: Key -> group.
        split: Support from `train`, queries are `val`.
        shots: Support images of a class.
        draws: Sets of support images.
        seed: Decides the draws; they are others than those of `evaluate_shots`.
        head: Registered head.

    Raises:
        DataError: there is nothing to choose from, or the validation part is empty.
    """
    if not candidates:
        raise DataError("No reading size was given. Name at least one.")
    if len(candidates) == 1:
        return SizeChoice(next(iter(candidates)), {})
    names = {f"{size} px": size for size in sorted(candidates)}
    table = evaluate_shots(
        {name: candidates[size] for name, size in names.items()},
        keys,
        labels,
        groups,
        split,
        shots=shots,
        draws=draws,
        seed=derive(seed, "size"),
        head=head,
        part="val",
    )
    found = {size: table.mean(name) for name, size in names.items()}
    return SizeChoice(max(found, key=lambda size: (found[size], -size)), found)


def _answer(
    head: str,
    options: Mapping[str, Any],
    x: np.ndarray,
    at: Mapping[str, int],
    support: Sequence[str],
    labels: Mapping[str, str],
    query_rows: np.ndarray,
) -> np.ndarray:
    fitted = find(HEADS, head)(**options)
    fitted.fit(x[[at[key] for key in support]], np.array([labels[key] for key in support]))
    return np.asarray(fitted.predict(x[query_rows]))


def _standardise(x: np.ndarray, pool: np.ndarray) -> np.ndarray:
    spread = pool.std(axis=0, dtype=np.float64)
    # A constant column would explode with the first query that differs: it is left out instead.
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-8)
    return ((x - pool.mean(axis=0, dtype=np.float64)) * scale).astype(np.float32)


def _check(
    vectors: Mapping[str, np.ndarray],
    at: Mapping[str, int],
    queries: Sequence[str],
    labels: Mapping[str, str],
    split: Split,
    part: str,
) -> None:
    if not split.train or not queries:
        raise DataError(
            f"The split has {len(split.train)} training and {len(queries)} {part} images. Both "
            "parts need some: give more images, or a split of your own."
        )
    absent = [key for key in (*split.train, *queries) if key not in at]
    if absent:
        raise DataError(
            f"{len(absent)} images of the split have no vectors (first: {absent[0]}). Embed them, "
            "or leave them out of the split."
        )
    nameless = [key for key in queries if key not in labels]
    if nameless:
        raise DataError(
            f"{len(nameless)} {part} images have no label (first: {nameless[0]}). Label them, or "
            "leave them out of the split."
        )
    if not any(key in labels for key in split.train):
        raise DataError("No training image has a label, so there is nothing to learn from.")
    for row, values in vectors.items():
        if values.ndim != 2 or len(values) != len(at) or not np.isfinite(values).all():
            raise ShapeError(
                f"Row '{row}' has shape {values.shape}; expected ({len(at)}, D) finite numbers, "
                "one line for every key."
            )


def _notes(
    supply: Sequence[str], labels: Mapping[str, str], truth: np.ndarray, most: int
) -> tuple[str, ...]:
    names, counts = np.unique([labels[key] for key in supply], return_counts=True)
    notes = []
    short = [str(name) for name, count in zip(names, counts, strict=True) if count < most]
    if short:
        notes.append(f"{_listed(short)} gave all labelled images, fewer than {most}.")
    unseen = sorted(set(truth.tolist()) - {str(name) for name in names})
    if unseen:
        notes.append(f"{_listed(unseen)} had no labelled training image: always counted wrong.")
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more classes" if len(names) > 3 else f"Class {shown}"

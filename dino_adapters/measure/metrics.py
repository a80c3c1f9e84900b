"""Classification metrics. A class without test images has no recall: it is missing, never 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from dino_adapters.contracts import DataError, Metric, ShapeError
from dino_adapters.measure.intervals import bootstrap, units_of

CHUNK_CELLS = 2**22
"""Numbers of confusion matrices held at once: 32 MiB."""
Labels = Sequence[str] | Sequence[int] | np.ndarray


def accuracy(y_true: Labels, y_pred: Labels) -> float:
    """Share of images whose class was found.

    Raises:
        ShapeError: lengths differ.
        DataError: there are no images.
    """
    true, predicted = _checked(y_true, y_pred)
    return float((true == predicted).mean())


def confusion(
    y_true: Labels, y_pred: Labels, classes: Labels | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Classes `(K,)` and counts `(K, K)`: row = true class, column = predicted class.

    Args:
        y_true: Length n.
        y_pred: Length n.
        classes: Order of rows; None takes all that occur, sorted.

    Raises:
        ShapeError: lengths differ.
        DataError: no images, or a class that `classes` does not name.
    """
    true, predicted = _checked(y_true, y_pred)
    names = np.unique(np.concatenate([true, predicted])) if classes is None else np.array(classes)
    numbers = {name: number for number, name in enumerate(names.tolist())}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    try:
        rows = [numbers[name] for name in true.tolist()]
        columns = [numbers[name] for name in predicted.tolist()]
    except KeyError as error:
        raise DataError(
            f"Class {error} occurs and is not among the classes {names.tolist()}. Name all classes."
        ) from error
    np.add.at(counts, (rows, columns), 1)
    return names, counts


def per_class_recall(
    y_true: Labels, y_pred: Labels, classes: Labels | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes `(K,)`, recall `(K,)` and support `(K,)`; recall is NaN where the support is 0."""
    names, counts = confusion(y_true, y_pred, classes)
    return names, _recall(counts[None])[0], counts.sum(axis=1)


def per_class_f1(
    y_true: Labels, y_pred: Labels, classes: Labels | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Classes `(K,)` and F1 `(K,)`: 0 if never right, NaN if never true nor predicted."""
    names, counts = confusion(y_true, y_pred, classes)
    return names, _f1(counts[None])[0]


def balanced_accuracy(y_true: Labels, y_pred: Labels) -> float:
    """Mean recall of the classes that have test images."""
    _, recall, _ = per_class_recall(y_true, y_pred)
    return float(np.nanmean(recall))


def macro_f1(y_true: Labels, y_pred: Labels) -> float:
    """Mean F1 of the classes that are true or predicted somewhere."""
    _, f1 = per_class_f1(y_true, y_pred)
    return float(np.nanmean(f1))


def classification_metrics(
    y_true: Labels,
    y_pred: Labels,
    groups: Sequence[str] | np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    split: str = "test",
) -> tuple[Metric, ...]:
    """Balanced accuracy, accuracy, macro F1 and each class's recall, with 95 % intervals.

    The intervals are percentile bootstraps over groups where given, else over images: they cover
    other test images of the same kind, and not another training of the head. A resample in which
    a class does not occur averages over the rest.

    Args:
        y_true: Length n.
        y_pred: Length n.
        groups: Length n: patient, ground tile or site of each image.
        seed: Of the resampling.
        resamples: Number of resamples.
        split: Which part of the data this is.

    Returns:
        `balanced_accuracy`, `accuracy`, `macro_f1`, then `recall/<class>` of every class that has
        images (count = images, or groups, with that class). Classes without any have no metric.

    Raises:
        ShapeError: lengths differ.
        DataError: there are no images.
    """
    true, predicted = _checked(y_true, y_pred)
    if groups is not None and len(groups) != len(true):
        raise ShapeError(f"There are {len(groups)} groups and {len(true)} images. Give one each.")
    unit_names, unit = units_of(np.arange(len(true)) if groups is None else groups)
    names = np.unique(np.concatenate([true, predicted]))
    size = len(names)
    codes, guesses = np.searchsorted(names, true), np.searchsorted(names, predicted)
    # Only pairs (true, predicted) that occur: K * K columns would be mostly empty.
    cells, cell = np.unique(codes * size + guesses, return_inverse=True)
    table = sparse.csr_matrix(
        (np.ones(len(true)), (unit, cell)), shape=(len(unit_names), len(cells))
    )

    def statistic(weights: np.ndarray) -> np.ndarray:
        occurring = np.asarray(weights @ table)
        return np.concatenate(
            [
                _summary(part, cells, size)
                for part in np.array_split(occurring, _parts(occurring, size))
            ]
        )

    values, low, high = bootstrap(statistic, len(unit_names), seed=seed, resamples=resamples)
    headlines = ("balanced_accuracy", "accuracy", "macro_f1")
    unit_word = "images" if groups is None else "groups"
    counts = [len(unit_names)] * len(headlines)
    counts += [len(np.unique(unit[codes == number])) for number in range(size)]
    labels = [*headlines, *(f"recall/{name}" for name in names.tolist())]
    rows = zip(labels, values, low, high, counts, strict=True)
    return tuple(
        Metric(name, float(value), float(left), float(right), count, unit_word, split)
        for name, value, left, right, count in rows
        if not np.isnan(value)
    )


def _summary(occurring: np.ndarray, cells: np.ndarray, size: int) -> np.ndarray:
    """Balanced accuracy, accuracy, macro F1, recalls `(R, 3 + K)` of weighted cells `(R, M)`."""
    counts = np.zeros((len(occurring), size * size))
    counts[:, cells] = occurring
    counts = counts.reshape(-1, size, size)
    recall, f1 = _recall(counts), _f1(counts)
    right = np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2))
    return np.column_stack([np.nanmean(recall, axis=1), right, np.nanmean(f1, axis=1), recall])


def _parts(occurring: np.ndarray, size: int) -> int:
    """Into how many parts resamples are split so that few matrices are held at once."""
    return max(1, min(len(occurring), len(occurring) * size * size // CHUNK_CELLS))


def _recall(counts: np.ndarray) -> np.ndarray:
    """`(R, K, K)` to `(R, K)`; NaN where a class has no images."""
    return _ratio(np.diagonal(counts, axis1=1, axis2=2), counts.sum(axis=2))


def _f1(counts: np.ndarray) -> np.ndarray:
    """`(R, K, K)` to `(R, K)`; NaN where a class is neither true nor predicted."""
    return _ratio(
        2.0 * np.diagonal(counts, axis1=1, axis2=2), counts.sum(axis=1) + counts.sum(axis=2)
    )


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    empty = np.full(below.shape, np.nan)
    return np.divide(above, below, out=empty, where=below > 0)


def _checked(y_true: Labels, y_pred: Labels) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = np.asarray(y_true), np.asarray(y_pred)
    if true.shape != predicted.shape or true.ndim != 1:
        raise ShapeError(
            f"There are {true.shape} true and {predicted.shape} predicted classes. Give one of "
            "each per image."
        )
    if not len(true):
        raise DataError("There are no images to judge. Check which split was asked for.")
    return true, predicted

"""Numbers of label maps."""

from __future__ import annotations

import numpy as np

from dino_adapters.contracts import DataError, ShapeError


def mean_iou(predicted: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Mean intersection over union of the classes.

    Of all places together, as PASCAL VOC and ADE20K count it: join the images first. A class that
    is neither predicted nor true anywhere is left out of the mean; one that is predicted but
    nowhere true counts as 0.

    Args:
        predicted: integers from 0 to `classes - 1`, any shape.
        truth: the same shape; places with a label below 0 are left out.
        classes: number of classes.

    Returns:
        0 to 1.

    Raises:
        ShapeError: the shapes differ.
        DataError: a label is not a whole number or out of range, or no place has a true label.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.shape != truth.shape:
        raise ShapeError(
            f"The prediction is {predicted.shape} and the truth is {truth.shape}. Give one label "
            "of each for every place."
        )
    if not all(np.issubdtype(labels.dtype, np.integer) for labels in (predicted, truth)):
        raise DataError(
            f"The prediction is {predicted.dtype} and the truth is {truth.dtype}. Give whole "
            "numbers: the classes, not their scores."
        )
    labelled = truth >= 0
    predicted, truth = predicted[labelled].astype(np.int64), truth[labelled].astype(np.int64)
    if not truth.size:
        raise DataError("No place has a true label of 0 or more. Check which masks were read.")
    low, high = int(predicted.min()), int(max(predicted.max(), truth.max()))
    if low < 0 or high >= classes:
        raise DataError(
            f"Labels run from {min(low, int(truth.min()))} to {high} and there are {classes} "
            f"classes. Give labels from 0 to {classes - 1}."
        )
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    counts = counts.reshape(classes, classes)
    shared = np.diagonal(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - shared
    return float((shared[union > 0] / union[union > 0]).mean())

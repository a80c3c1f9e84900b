"""Stored tokens to the vectors that heads take."""

from __future__ import annotations

from typing import Literal

import numpy as np

from dino_adapters.contracts import UnknownNameError
from dino_adapters.features.store import StoredFeatures
from dino_adapters.runtime.lookup import nearest

Kind = Literal["cls", "mean", "cls_mean"]
KINDS: tuple[Kind, ...] = ("cls", "mean", "cls_mean")


def vectors(stored: StoredFeatures, kind: Kind = "cls") -> np.ndarray:
    """One float32 vector an image.

    Args:
        stored: From `FeatureStore.read`.
        kind: `cls` is the CLS token `(n, D)`, as DINOv3's own probes take it (arXiv 2508.10104,
            D.7). `mean` is the mean patch token `(n, D)`. `cls_mean` is both `(n, 2D)`, each
            scaled to unit length and then divided by sqrt(2), so that both weigh the same.

    Raises:
        UnknownNameError: there is no such kind.
    """
    if kind == "cls":
        return stored.cls
    if kind == "mean":
        return stored.mean
    if kind == "cls_mean":
        halves = [unit_rows(stored.cls), unit_rows(stored.mean)]
        return np.concatenate(halves, axis=1) / np.float32(np.sqrt(2.0))
    raise UnknownNameError(f"There is no kind of vector called '{kind}'. {nearest(kind, KINDS)}")


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    """Rows `(n, D)` scaled to unit length; zero rows stay zero. Keeps the dtype."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norms == 0.0, 1.0, norms).astype(matrix.dtype, copy=False)

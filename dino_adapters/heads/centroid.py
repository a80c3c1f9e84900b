"""Nearest class mean: the head for one to a few labels a class."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np

from dino_adapters.contracts import RecipeError, ShapeError
from dino_adapters.features.pool import unit_rows
from dino_adapters.heads.estimator import VectorHead, softmax
from dino_adapters.measure.metrics import Labels
from dino_adapters.runtime.lookup import HEADS

Centre = np.ndarray | Literal["support"] | None


@HEADS.register_module("ncm")
class NearestMean(VectorHead):
    """Centre, scale to unit length, and take the class whose mean is nearest.

    Source: SimpleShot, its variant CL2N (arXiv 1911.04623). Scores are negative squared Euclidean
    distances. Every class weighs the same, whatever its number of images.

    Args:
        centre: What is subtracted first. `support`: the mean of the class means of the labelled
            images. An array `(D,)`: the mean of unlabelled images, better where there are some.
            None: nothing.
        temperature: Of `predict_proba`; the probabilities are not calibrated.
    """

    arrays = ("means_", "centre_")

    def __init__(self, centre: Centre = "support", temperature: float = 0.07) -> None:
        self.centre = centre
        self.temperature = temperature

    def fit(self, X: np.ndarray, y: Labels) -> Self:
        """Learns the class means of vectors `(n, D)` with classes `(n,)`.

        Raises:
            RecipeError: the centre is no known word, or the temperature is not positive.
            ShapeError: the centre's width is not D.
            ValueError: scikit-learn finds X or y unfit; its sentence says why.
        """
        X, codes = self._checked(X, y)
        if not self.temperature > 0.0:
            raise RecipeError(f"temperature is {self.temperature}. Use one above 0.")
        self.centre_ = self._centre_of(X, codes)
        self.means_ = class_means(unit_rows(X - self.centre_), codes, len(self.classes_))
        return self

    def class_scores(self, X: np.ndarray) -> np.ndarray:
        """Negative squared distance to each class mean: `(n, K)`, in -4 to 0."""
        Z = unit_rows(X - self.centre_)
        products = 2.0 * Z @ self.means_.T
        squares = (self.means_**2).sum(axis=1)
        return products - squares - (Z**2).sum(axis=1, keepdims=True)

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Softmax of scores / temperature: `(n, K)`."""
        return softmax(self._scores_of(X) / self.temperature)

    def _centre_of(self, X: np.ndarray, codes: np.ndarray) -> np.ndarray:
        if self.centre is None:
            return np.zeros(X.shape[1], dtype=X.dtype)
        if isinstance(self.centre, str):
            if self.centre != "support":
                raise RecipeError(
                    f"centre is '{self.centre}'. Use 'support', None, or an array of width "
                    f"{X.shape[1]}."
                )
            return class_means(X, codes, len(self.classes_)).mean(axis=0)
        centre = np.asarray(self.centre, dtype=X.dtype)
        if centre.shape != (X.shape[1],):
            raise ShapeError(
                f"centre is {centre.shape} and the vectors are {X.shape[1]} wide. Take the mean of "
                "vectors of the same backbone and kind."
            )
        return centre


def class_means(X: np.ndarray, codes: np.ndarray, classes: int) -> np.ndarray:
    """Mean `(K, D)` of the rows `(n, D)` of each class number 0 to K - 1; each must occur."""
    member = np.zeros((classes, len(X)), dtype=X.dtype)
    member[codes, np.arange(len(X))] = 1.0
    return (member @ X) / member.sum(axis=1, keepdims=True)

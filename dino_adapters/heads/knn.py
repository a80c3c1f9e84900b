"""Weighted k-nearest neighbours, as DINO evaluates it."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch

from dino_adapters.contracts import RecipeError
from dino_adapters.features.neighbours import nearest
from dino_adapters.features.pool import unit_rows
from dino_adapters.heads.estimator import VectorHead
from dino_adapters.measure.metrics import Labels
from dino_adapters.runtime.lookup import HEADS


@HEADS.register_module("knn")
class WeightedKNN(VectorHead):
    """Cosine k-NN; each neighbour votes with exp(similarity / temperature).

    Source: Wu et al. (arXiv 1805.01978, section 3.4), as used by DINO (arXiv 2104.14294) with
    temperature 0.07. Nothing is fitted, so its number shows the vectors themselves.

    Args:
        k: Neighbours that vote; more than there are images means all of them (`k_`).
        temperature: Smaller lets the nearest ones decide.
    """

    arrays = ("bank_", "codes_")
    facts = ("k_",)

    def __init__(self, k: int = 10, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature

    def fit(self, X: np.ndarray, y: Labels) -> Self:
        """Keeps the vectors `(n, D)`, scaled to unit length, and their classes `(n,)`.

        Raises:
            RecipeError: k is below 1 or the temperature is not positive.
            ValueError: scikit-learn finds X or y unfit; its sentence says why.
        """
        if self.k < 1 or not self.temperature > 0.0:
            raise RecipeError(
                f"k is {self.k} and temperature {self.temperature}. Use k of 1 or more and a "
                "temperature above 0 (DINO: 10 to 200, and 0.07)."
            )
        X, codes = self._checked(X, y)
        self.bank_ = unit_rows(X)
        self.codes_ = codes.astype(np.int64)
        self.k_ = min(self.k, len(X))
        return self

    def class_scores(self, X: np.ndarray) -> np.ndarray:
        """Share of the votes of each class: `(n, K)`."""
        bank, queries = torch.from_numpy(self.bank_), torch.from_numpy(np.ascontiguousarray(X))
        indices, similarities = nearest(queries, bank, self.k_)
        # Relative to the best: exp(1 / 0.001) would overflow, and shares are the same.
        powers = ((similarities - similarities[:, :1]) / self.temperature).double().exp()
        votes = torch.zeros((len(X), len(self.classes_)), dtype=torch.float64)
        votes.scatter_add_(1, torch.from_numpy(self.codes_)[indices], powers)
        return (votes / votes.sum(dim=1, keepdim=True)).numpy()

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Share of the votes of each class: `(n, K)`."""
        return self._scores_of(X)

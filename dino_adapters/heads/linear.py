"""The linear probe: multinomial logistic regression whose strength the labels choose."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from dino_adapters.contracts import DataError, RecipeError, ShapeError
from dino_adapters.features.pool import unit_rows
from dino_adapters.heads.estimator import VectorHead
from dino_adapters.heads.logistic import Solutions, fit_logistic, row_space
from dino_adapters.measure.metrics import Labels
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.lookup import HEADS

LOGGER = logging.getLogger(__name__)
GRID: tuple[float, ...] = tuple(float(value) for value in np.logspace(-6, 4, 21))
FIXED_C = 10.0
"""Where one label a class leaves nothing to choose by; 10 to 100 are alike on unit vectors."""
SEARCH_TOL = 1e-5
"""Enough to rank strengths; the chosen one is then solved to `tol`."""


@HEADS.register_module("linear")
class LinearProbe(VectorHead):
    """Logistic regression on frozen vectors, the standard probe (DINOv3: arXiv 2508.10104, D.7).

    C multiplies the data term, as in scikit-learn. It is chosen by the balanced log loss (mean over
    classes of the mean loss of each) on the validation set if `fit` gets one, else out of fold in
    stratified folds that respect groups. With one image or group in some class nothing can be held
    out, and C is 10.

    Args:
        C: A fixed strength; None chooses from `grid`.
        grid: Strengths to choose from; None means 21 from 1e-6 to 1e4, evenly in the logarithm.
        folds: Folds, and fewer where a class has fewer images or groups.
        scaling: `unit`: subtract the training mean and scale each vector to length 1. `zscore`:
            scale each column by its spread (at least a tenth of the median spread, or dead
            channels would be blown up), then by sqrt(D). `none`: vectors as they are.
        tol: Largest entry of the gradient of the mean loss that counts as converged.
        max_iter: Iterations.
        seed: Of the folds.

    Attributes:
        C_: The strength used.
        chosen_by_: `given`, `validation`, `folds`, or `fixed` (too few labels to choose).
        at_edge_: Whether C_ is the first or last of the grid, so that the best may lie beyond.
        grid_: The strengths tried, and `losses_` their balanced log losses; empty without a choice.
        converged_: Whether the final fit reached `tol`, after `n_iter_` iterations.
        coef_: `(K, D)`, on scaled vectors; `intercept_`: `(K,)`.
    """

    arrays = ("coef_", "intercept_", "centre_", "scale_", "grid_", "losses_")
    facts = ("C_", "chosen_by_", "at_edge_", "converged_", "n_iter_")

    def __init__(
        self,
        C: float | None = None,
        grid: Sequence[float] | None = None,
        folds: int = 5,
        scaling: Literal["unit", "zscore", "none"] = "unit",
        tol: float = 1e-6,
        max_iter: int = 5000,
        seed: int = 0,
    ) -> None:
        self.C = C
        self.grid = grid
        self.folds = folds
        self.scaling = scaling
        self.tol = tol
        self.max_iter = max_iter
        self.seed = seed

    def fit(
        self,
        X: np.ndarray,
        y: Labels,
        *,
        X_val: np.ndarray | None = None,
        y_val: Labels | None = None,
        groups: Labels | None = None,
    ) -> Self:
        """Chooses C and fits on vectors `(n, D)` with classes `(n,)`.

        Args:
            X: Vectors to learn from; validation vectors are never added to them.
            y: Their classes.
            X_val: Vectors to choose C by.
            y_val: Their classes.
            groups: Length n: images of one group are never divided by a fold.

        Raises:
            RecipeError: C, the grid, the folds or the scaling are not usable.
            DataError: one class only, or a validation class that training does not have.
            ShapeError: vectors, classes and groups differ in length.
            ValueError: scikit-learn finds X or y unfit; its sentence says why.
        """
        grid = self._checked_options()
        X, codes = self._checked(X, y)
        if len(self.classes_) < 2:
            raise DataError(
                f"All {len(codes)} labels are of one class, '{self.classes_[0]}'. A linear probe "
                "needs two classes or more."
            )
        if groups is not None and len(groups) != len(codes):
            raise ShapeError(f"There are {len(groups)} groups and {len(codes)} images.")
        if (X_val is None) != (y_val is None):
            raise ShapeError("X_val and y_val go together: give both or none.")
        # Threads that spin while other processes work cost more than these products (30 times).
        with threadpool_limits(1):
            Z, basis = row_space(self._learn_scaling(X.astype(np.float64)))
            if self.C is not None:
                self._record(float(self.C), "given")
            elif X_val is not None and y_val is not None:
                held, targets = self._checked_validation(X_val, y_val)
                losses = self._validation_losses(grid, Z, codes, held @ basis.T, targets)
                self._take_best(grid, losses, "validation")
            elif folds := list(stratified_folds(codes, groups, self.folds, self.seed)):
                self._take_best(grid, self._fold_losses(grid, Z, codes, folds), "folds")
            else:
                self._record(FIXED_C, "fixed")
            solution = self._solve(np.array([self.C_]), Z, codes, tol=self.tol)
        self.coef_ = solution.coef[0] @ basis
        self.intercept_ = solution.intercept[0]
        self.converged_ = bool(solution.converged[0])
        self.n_iter_ = int(solution.iterations[0])
        if not self.converged_:
            LOGGER.warning(
                "The linear probe did not converge in %d iterations at C = %g. Raise max_iter, or "
                "lower the grid's largest C.",
                self.max_iter,
                self.C_,
            )
        return self

    def class_scores(self, X: np.ndarray) -> np.ndarray:
        """Logits `(n, K)`."""
        return self._scaled(X.astype(np.float64)) @ self.coef_.T + self.intercept_

    def _checked_options(self) -> np.ndarray:
        grid = np.array(GRID if self.grid is None else sorted(self.grid), dtype=np.float64)
        strengths = grid if self.C is None else np.array([self.C], dtype=np.float64)
        if not len(strengths) or not (np.isfinite(strengths) & (strengths > 0)).all():
            raise RecipeError(
                f"C is {self.C} and the grid {self.grid}. Strengths must be finite and above 0."
            )
        if self.folds < 2:
            raise RecipeError(f"folds is {self.folds}. Choosing C needs 2 or more.")
        if self.scaling not in ("unit", "zscore", "none"):
            raise RecipeError(f"scaling is '{self.scaling}'. Use unit, zscore or none.")
        return grid

    def _learn_scaling(self, X: np.ndarray) -> np.ndarray:
        width = X.shape[1]
        plain = self.scaling == "none"
        self.centre_ = np.zeros(width) if plain else X.mean(axis=0)
        self.scale_ = np.ones(width)
        if self.scaling == "zscore":
            spread = X.std(axis=0)
            floor = 0.1 * float(np.median(spread)) or float(spread.max()) or 1.0
            self.scale_ = np.maximum(spread, floor) * np.sqrt(width)
        return self._scaled(X)

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        Z = (X - self.centre_) / self.scale_
        return unit_rows(Z) if self.scaling == "unit" else Z

    def _record(self, strength: float, chosen_by: str) -> None:
        self.C_, self.chosen_by_, self.at_edge_ = strength, chosen_by, False
        self.grid_, self.losses_ = np.zeros(0), np.zeros(0)

    def _take_best(self, grid: np.ndarray, losses: np.ndarray, chosen_by: str) -> None:
        if not len(losses):
            self._record(FIXED_C, "fixed")
            return
        best = int(np.argmin(losses))  # the first of equals: the stronger regularisation
        self._record(float(grid[best]), chosen_by)
        self.grid_, self.losses_ = grid, losses
        self.at_edge_ = best in (0, len(grid) - 1)

    def _checked_validation(
        self, X_val: np.ndarray, y_val: Labels
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scaled validation vectors and class numbers."""
        X_val, truth = np.asarray(X_val, dtype=np.float64), np.asarray(y_val)
        width = self.n_features_in_
        if X_val.shape != (len(truth), width) or not len(truth) or not np.isfinite(X_val).all():
            raise ShapeError(
                f"X_val is {X_val.shape} with {len(truth)} classes in y_val. Give at least one "
                f"finite vector of width {width}, and a class for each."
            )
        unknown = sorted({str(name) for name in np.setdiff1d(truth, self.classes_)})
        if unknown:
            raise DataError(
                f"Validation holds classes that training does not: {', '.join(unknown)}. Divide "
                "the labels so that every class is trained on."
            )
        return self._scaled(X_val), np.searchsorted(self.classes_, truth)

    def _validation_losses(
        self,
        grid: np.ndarray,
        Z: np.ndarray,
        codes: np.ndarray,
        held: np.ndarray,
        targets: np.ndarray,
    ) -> np.ndarray:
        found = self._solve(grid, Z, codes, tol=max(self.tol, SEARCH_TOL))
        return _balanced(_log_losses(found, held, targets), targets)

    def _fold_losses(
        self, grid: np.ndarray, Z: np.ndarray, codes: np.ndarray, folds: list[np.ndarray]
    ) -> np.ndarray:
        """Balanced log loss of each strength, each image judged by the fold it was held out of."""
        members = np.ones((len(folds), len(codes)), dtype=bool)
        for number, held in enumerate(folds):
            members[number, held] = False
        found = self._solve(
            np.tile(grid, len(folds)),
            Z,
            codes,
            members=np.repeat(members, len(grid), axis=0),
            tol=max(self.tol, SEARCH_TOL),
        )
        losses = np.zeros((len(grid), len(codes)))
        for number, held in enumerate(folds):
            mine = slice(number * len(grid), (number + 1) * len(grid))
            losses[:, held] = _log_losses(found.part(mine), Z[held], codes[held])
        # A fold of whole groups may take all images of a class along; nothing can be learned
        # about that class there, at any strength, so those images have no say.
        known = np.isfinite(losses).all(axis=0)
        if not known.any():
            return np.zeros(0)
        return _balanced(losses[:, known], codes[known])

    def _solve(
        self,
        strengths: np.ndarray,
        Z: np.ndarray,
        codes: np.ndarray,
        *,
        tol: float,
        members: np.ndarray | None = None,
    ) -> Solutions:
        classes = len(self.classes_)
        if classes == 2:
            # Two weight vectors, w and -w, are penalised half as much as scikit-learn's one, 2w.
            strengths = strengths / 2.0
        return fit_logistic(
            Z, codes, classes, strengths, members=members, tol=tol, max_iter=self.max_iter
        )


def stratified_folds(
    codes: np.ndarray, groups: Labels | None, folds: int, seed: int
) -> Iterator[np.ndarray]:
    """Row numbers held out by each fold; none at all if some class has one image or group.

    Args:
        codes: Class numbers `(n,)`.
        groups: Length n, or None.
        folds: At most this many; fewer where a class has fewer images or groups.
        seed: Of the shuffling.
    """
    units = np.arange(len(codes)) if groups is None else np.asarray(groups)
    fewest = min(len(np.unique(units[codes == number])) for number in np.unique(codes))
    count = min(folds, fewest)
    if count < 2:
        return
    state = derive(seed, "folds of the linear probe") % 2**32
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(count, shuffle=True, random_state=state)
    rows = np.zeros((len(codes), 1))
    for _, held in splitter.split(rows, codes, None if groups is None else units):
        if len(held):
            yield held


def _log_losses(found: Solutions, Z: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log probability of each row's class under each solution: `(n, r)`, `(n,)` to `(H, n)`."""
    losses = np.zeros((len(found.coef), len(Z)))
    for number, (coef, intercept) in enumerate(zip(found.coef, found.intercept, strict=True)):
        logits = Z @ coef.T + intercept
        logits -= logits.max(axis=1, keepdims=True)
        own = logits[np.arange(len(Z)), targets]
        losses[number] = np.log(np.exp(logits).sum(axis=1)) - own
    return losses


def _balanced(losses: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean over classes of each class's mean: `(H, n)`, `(n,)` to `(H,)`."""
    return np.stack(
        [losses[:, targets == number].mean(axis=1) for number in np.unique(targets)]
    ).mean(axis=0)

"""Many multinomial logistic regressions at once: every strength and fold in the same products.

One problem is far too small to fill a processor at ten labels a class. All of a grid together
share one matrix product an iteration, and those that have converged are dropped from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MEMORY = 5
"""Pairs that L-BFGS keeps; more gains little, as the axes are rotated to the data's own."""
CHUNK_CELLS = 2**24
"""Numbers of logits or history held at once: 128 MiB."""

Evaluate = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Solutions:
    """H fitted problems: coef `(H, K, r)`, intercept `(H, K)`, converged and iterations `(H,)`."""

    coef: np.ndarray
    intercept: np.ndarray
    converged: np.ndarray
    iterations: np.ndarray

    def part(self, chosen: slice) -> Solutions:
        """Some of the problems."""
        arrays = (self.coef, self.intercept, self.converged, self.iterations)
        return Solutions(*(array[chosen] for array in arrays))


def row_space(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in rotated coordinates `(n, r)`, and the basis `(r, D)` that leads back.

    r = min(n, D). The optimum of a problem with an L2 penalty lies in the span of the rows, and a
    rotation changes neither loss nor penalty: solving for r coordinates is exact. The axes are
    those of the second moments, so that scaling each by its own variance conditions the problem.
    """
    count, width = X.shape
    if count < width:
        basis, upper = np.linalg.qr(X.T)
        _, axes = np.linalg.eigh(upper @ upper.T)
        basis = (basis @ axes).T
    else:
        _, axes = np.linalg.eigh(X.T @ X)
        basis = axes.T
    return X @ basis.T, basis


def fit_logistic(
    Z: np.ndarray,
    codes: np.ndarray,
    classes: int,
    strengths: np.ndarray,
    *,
    members: np.ndarray | None = None,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Solutions:
    """Minimises mean cross-entropy + |W|^2 / (2 C n) for each strength C; the bias is free.

    The minimum is that of scikit-learn's `LogisticRegression(C)` for three or more classes.

    Args:
        Z: `(n, r)` float64; coordinates of `row_space` converge fastest.
        codes: Class numbers `(n,)` in 0 to K - 1.
        classes: K. Every problem needs an image of every class, or its bias has no minimum:
            absent ones are left out of that problem and get the intercept -inf.
        strengths: C of each problem `(H,)`.
        members: bool `(H, n)`: which images a problem learns from; None means all.
        tol: Largest entry of the gradient at which a problem counts as solved.
        max_iter: Iterations after which it counts as not converged.
    """
    count, width = Z.shape
    rows = np.column_stack([Z, np.ones(count)])
    members = np.ones((len(strengths), count), dtype=bool) if members is None else members
    size = classes * max(count, 2 * (MEMORY + 3) * (width + 1))
    step = max(CHUNK_CELLS // size, 1)
    parts = []
    for start in range(0, len(strengths), step):
        chosen = slice(start, start + step)
        problem = _Problems(rows, codes, classes, strengths[chosen], members[chosen])
        begin = np.zeros((len(strengths[chosen]), classes * (width + 1)))
        theta, converged, iterations = minimise(
            problem.evaluate, begin, problem.scales(), tol=tol, max_iter=max_iter
        )
        theta = theta.reshape(-1, classes, width + 1)
        intercept = np.where(problem.present, theta[:, :, -1], -np.inf)
        parts.append((theta[:, :, :-1], intercept, converged, iterations))
    return Solutions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class _Problems:
    """Losses and gradients of several problems on the same rows."""

    def __init__(
        self,
        rows: np.ndarray,
        codes: np.ndarray,
        classes: int,
        strengths: np.ndarray,
        members: np.ndarray,
    ) -> None:
        self.rows, self.classes = rows, classes
        onehot = np.eye(classes)[codes]
        self.onehot = onehot[:, None, :]
        totals = members.sum(axis=1)
        self.weights = (members / totals[:, None]).T  # (n, H)
        self.present = members.astype(float) @ onehot > 0  # (H, K)
        self.penalty = 1.0 / (strengths * totals)

    def evaluate(self, theta: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses `(h,)` and gradients `(h, P)` of the problems numbered `heads`."""
        count, width = self.rows.shape
        matrix = theta.reshape(-1, width)
        logits = (self.rows @ matrix.T).reshape(count, len(heads), self.classes)
        present = self.present[heads]
        if not present.all():
            logits = np.where(present, logits, -np.inf)
        logits -= logits.max(axis=2, keepdims=True)
        # Images outside a problem may be of a class that it lacks: their loss is inf, weight 0.
        own = np.where(self.onehot > 0, logits, 0.0).sum(axis=2)
        powers = np.exp(logits, out=logits)
        sums = powers.sum(axis=2)
        weights = self.weights[:, heads]
        losses = np.where(weights > 0, np.log(sums) - own, 0.0)
        powers /= sums[:, :, None]
        powers -= self.onehot
        powers *= weights[:, :, None]
        gradient = (powers.reshape(count, -1).T @ self.rows).reshape(len(heads), -1, width)
        table = theta.reshape(len(heads), -1, width)
        penalty = self.penalty[heads]
        total = (losses * weights).sum(axis=0)
        total += 0.5 * penalty * (table[:, :, :-1] ** 2).sum(axis=(1, 2))
        gradient[:, :, :-1] += penalty[:, None, None] * table[:, :, :-1]
        return total, gradient.reshape(len(heads), -1)

    def scales(self) -> np.ndarray:
        """Inverse of the Hessian's diagonal at 0, `(H, P)`: what a coordinate's step is worth."""
        share = (1.0 - 1.0 / self.classes) / self.classes
        curvature = share * (self.rows**2).mean(axis=0)
        curvature = np.tile(curvature, (len(self.penalty), self.classes, 1))
        curvature[:, :, :-1] += self.penalty[:, None, None]
        return 1.0 / np.maximum(curvature, 1e-12).reshape(len(self.penalty), -1)


def minimise(
    evaluate: Evaluate, theta: np.ndarray, scales: np.ndarray, *, tol: float, max_iter: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L-BFGS on many smooth convex functions at once (Liu and Nocedal 1989).

    Args:
        evaluate: From points `(h, P)` and the numbers of their functions `(h,)` to values `(h,)`
            and gradients `(h, P)`.
        theta: Where each starts: `(H, P)`.
        scales: Diagonal of the first guess of each inverse Hessian: `(H, P)`, positive.
        tol: A function is solved when no entry of its gradient is larger.
        max_iter: Iterations.

    Returns:
        Points `(H, P)`, whether each was solved `(H,)`, and its iterations `(H,)`.
    """
    found, solved = theta.copy(), np.zeros(len(theta), dtype=bool)
    iterations = np.zeros(len(theta), dtype=np.int64)
    heads = np.arange(len(theta))
    value, gradient = evaluate(theta, heads)
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for _ in range(max_iter):
        done = np.abs(gradient).max(axis=1) <= tol
        if done.any():
            found[heads[done]], solved[heads[done]] = theta[done], True
            keep = ~done
            heads, theta, value, gradient = heads[keep], theta[keep], value[keep], gradient[keep]
            scales = scales[keep]
            pairs = [(s[keep], y[keep], inverse[keep]) for s, y, inverse in pairs]
        if not len(heads):
            return found, solved, iterations
        direction = -_inverse_hessian_times(gradient, pairs, scales)
        new_theta, new_value, new_gradient = _search(
            evaluate, heads, theta, value, gradient, direction
        )
        s, y = new_theta - theta, new_gradient - gradient
        products = np.einsum("hp,hp->h", s, y)
        # A pair without curvature (a step too small to measure) is given no say.
        inverse = np.divide(1.0, products, out=np.zeros_like(products), where=products > 1e-300)
        pairs = [*pairs[1 - MEMORY :], (s, y, inverse)]
        theta, value, gradient = new_theta, new_value, new_gradient
        iterations[heads] += 1
    found[heads] = theta
    solved[heads] = np.abs(gradient).max(axis=1, initial=0.0) <= tol
    return found, solved, iterations


def _inverse_hessian_times(
    gradient: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    scales: np.ndarray,
) -> np.ndarray:
    """The two-loop recursion, row by row."""
    result, factors = gradient.copy(), []
    for s, y, inverse in reversed(pairs):
        factor = inverse * np.einsum("hp,hp->h", s, result)
        result -= factor[:, None] * y
        factors.append(factor)
    result *= scales
    if pairs:
        _, y, inverse = pairs[-1]
        bent = inverse * np.einsum("hp,hp,hp->h", y, scales, y)
        result /= np.where(bent > 0.0, bent, 1.0)[:, None]
    for (s, y, inverse), factor in zip(pairs, reversed(factors), strict=True):
        back = factor - inverse * np.einsum("hp,hp->h", y, result)
        result += back[:, None] * s
    return result


def _search(
    evaluate: Evaluate,
    heads: np.ndarray,
    theta: np.ndarray,
    value: np.ndarray,
    gradient: np.ndarray,
    direction: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Armijo backtracking from step 1; a function that cannot be lowered stays where it is."""
    slope = np.einsum("hp,hp->h", gradient, direction)
    point, level, slant = theta.copy(), value.copy(), gradient.copy()
    open_ = np.arange(len(heads))
    step = 1.0
    for _ in range(30):
        trial = theta[open_] + step * direction[open_]
        trial_value, trial_gradient = evaluate(trial, heads[open_])
        # Near the minimum, rounding hides the last gains: allow as much as it can hide.
        room = 1e-4 * step * slope[open_] + 1e-15 * (1.0 + np.abs(value[open_]))
        good = trial_value <= value[open_] + room
        chosen = open_[good]
        point[chosen], level[chosen] = trial[good], trial_value[good]
        slant[chosen] = trial_gradient[good]
        open_ = open_[~good]
        if not len(open_):
            break
        step /= 2.0
    return point, level, slant

"""Intervals, and what each of them covers.

mean_interval      other draws of the support images, the test set as it is
paired_interval    the same, for the difference of two methods on the same draws
bootstrap          other test images or groups, the fitted head as it is
paired_bootstrap   both at once: other draws and other test groups, for a difference

Draws share one test set. Their t interval can therefore be narrow around a number that another
test set would move, and it shrinks with the number of draws without limit; `paired_bootstrap` is
the one to quote for "method A is better than method B on data like this".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse, stats

from dino_adapters.contracts import DataError, ShapeError

CHUNK_CELLS = 2**22
"""Weights held at once by a bootstrap: 32 MiB in float64."""
LEAST_GROUPS = 10
"""Verdicts need as many groups of images: from fewer, an interval would be far too short."""


def mean_interval(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean and Student t interval of independent values, e.g. one accuracy per draw of shots.

    Args:
        values: At least one number.
        level: Coverage.

    Returns:
        mean, low, high; all three equal for a single value, of which no interval can be had.

    Raises:
        DataError: no values, or one that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if numbers.size == 0 or not np.isfinite(numbers).all():
        raise DataError(
            f"{numbers.size} values were given, {int(np.isfinite(numbers).sum())} of them finite. "
            "An interval needs at least one and all of them finite: leave out what is missing."
        )
    mean = float(numbers.mean())
    if numbers.size == 1:
        return mean, mean, mean
    error = float(numbers.std(ddof=1)) / np.sqrt(numbers.size)
    reach = float(stats.t.ppf(0.5 + level / 2.0, numbers.size - 1)) * error
    return mean, mean - reach, mean + reach


def paired_interval(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a - b and its Student t interval, where `a[i]` and `b[i]` used the same draw i.

    Raises:
        ShapeError: the two differ in length.
        DataError: as `mean_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ShapeError(
            f"The two methods have {first.shape} and {second.shape} values. Pairs need one value "
            "of each method per draw, in the same order."
        )
    return mean_interval(first - second, level=level)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    units: int,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap of one or more statistics over exchangeable units.

    Args:
        statistic: From weights `(R, units)` (how often each unit was drawn, 1 for the data as they
            are) to values `(R,)` or `(R, M)`; NaN where undefined, which is then left out.
        units: Number of images, or of groups where images of a group resemble each other.
        seed: Of the resampling.
        resamples: At least 1000 for anything that is published.
        level: Coverage aimed at. With few units the real one is lower: about 0.9 at 20 units.

    Returns:
        value, low, high: each `()` or `(M,)`; NaN where the data give no value.

    Raises:
        DataError: there are no units.
    """
    low, high = _ends(statistic, units, seed=seed, resamples=resamples, level=level)
    value = np.asarray(statistic(np.ones((1, units))))[0]
    missing = np.isnan(value)
    return value, np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def paired_bootstrap(
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    groups: Sequence[str] | np.ndarray | None = None,
    *,
    labels: Sequence[str] | np.ndarray | None = None,
    over_draws: bool = True,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Difference in accuracy of two methods, resampled over test groups and over draws.

    Draws and test groups are crossed (every draw is judged on every test image), so both are drawn
    anew, independently, in each resample (the pigeonhole bootstrap: Owen 2007, Annals of Applied
    Statistics 1(2)). The interval covers other draws of the support images and other test images
    of the same kind. With `over_draws=False` it covers other test images only.

    Args:
        correct_a: `(draws, n)` or `(n,)`: whether method A was right on each test image.
        correct_b: The same of method B, on the same draws and images.
        groups: Length n: what belongs together among test images; None: each stands alone.
        labels: Length n: true classes. Given, the difference is of balanced accuracy.
        over_draws: Resample the draws, too; without effect for a single one.
        seed: Of the resampling.
        resamples: Number of resamples.
        level: Coverage aimed at.

    Returns:
        a - b: value, low, high.

    Raises:
        ShapeError: lengths differ.
    """
    first = np.atleast_2d(np.asarray(correct_a, dtype=np.float64))
    second = np.atleast_2d(np.asarray(correct_b, dtype=np.float64))
    draws, items = first.shape
    names = np.arange(items) if groups is None else np.asarray(groups)
    classes = np.zeros(items, int) if labels is None else np.asarray(labels)
    if first.shape != second.shape or names.shape != (items,) or classes.shape != (items,):
        raise ShapeError(
            f"Method A has {first.shape} answers, method B {second.shape}; groups {names.shape}, "
            f"labels {classes.shape}. All must be of the same draws and test images."
        )
    _, unit = units_of(names)
    _, code = np.unique(classes, return_inverse=True)
    # Cells are the (unit, class) pairs that occur: all that a weighted balanced accuracy needs.
    cells, cell = np.unique(np.stack([unit, code]), axis=1, return_inverse=True)
    shape = (items, cells.shape[1])
    member = sparse.csr_matrix((np.ones(items), (np.arange(items), cell.ravel())), shape=shape)
    gains = np.asarray((member.T @ (first - second).T).T)
    sizes = np.asarray(member.sum(axis=0)).ravel()
    to_class = sparse.csr_matrix((np.ones(shape[1]), (np.arange(shape[1]), cells[1])))
    draw_generator = np.random.default_rng([seed, 1])

    def difference(weights: np.ndarray, by_draw: np.ndarray) -> np.ndarray:
        drawn = weights[:, cells[0]]
        gained = (drawn * (by_draw @ gains / draws)) @ to_class
        return _mean_of_present(np.asarray(gained), np.asarray((drawn * sizes) @ to_class))

    def resampled(weights: np.ndarray) -> np.ndarray:
        if not over_draws:
            return difference(weights, np.ones((1, draws)))
        return difference(weights, _draw(draw_generator, len(weights), draws))

    units = int(unit.max()) + 1
    value = difference(np.ones((1, units)), np.ones((1, draws)))[0]
    low, high = _ends(resampled, units, seed=seed, resamples=resamples, level=level)
    return float(value), float(low), float(high)


def units_of(groups: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct groups, and the number of its group for each image."""
    names, unit = np.unique(np.asarray(groups), return_inverse=True)
    return names, unit


def _ends(
    statistic: Callable[[np.ndarray], np.ndarray],
    units: int,
    *,
    seed: int,
    resamples: int,
    level: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the interval of `bootstrap`."""
    if units < 1:
        raise DataError("A bootstrap was asked for over 0 units. Give at least one image or group.")
    generator = np.random.default_rng(seed)
    chunk = max(CHUNK_CELLS // units, 1)
    parts = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        parts.append(statistic(_draw(generator, count, units)))
    return _percentiles(np.concatenate(parts), level)


def _draw(generator: np.random.Generator, count: int, units: int) -> np.ndarray:
    """How often each unit is drawn in `count` resamples of `units` draws: `(count, units)`."""
    drawn = generator.integers(0, units, size=(count, units))
    flat = (drawn + np.arange(count)[:, None] * units).ravel()
    return np.bincount(flat, minlength=count * units).reshape(count, units).astype(np.float64)


def _mean_of_present(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of sum / count: `(R, K)`, `(R, K)` to `(R,)`."""
    present = counts > 0
    shares = np.divide(sums, counts, out=np.zeros_like(sums, dtype=np.float64), where=present)
    return shares.sum(axis=1) / present.sum(axis=1)


def _percentiles(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the middle `level` of each column, NaN left out; NaN for a column without values."""
    columns = values.reshape(len(values), -1)
    low, high = np.full(columns.shape[1], np.nan), np.full(columns.shape[1], np.nan)
    ends = np.array([0.5 - level / 2.0, 0.5 + level / 2.0])
    for number, column in enumerate(columns.T):
        known = column[~np.isnan(column)]
        if known.size:
            low[number], high[number] = np.quantile(known, ends)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])

"""Classes of vectors from labelled ones, by k-NN and linear probe; and what may be chosen by.

Pure functions of arrays. Nothing here sees which answers would be right but for the labelled
vectors themselves.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dino_adapters.contracts import DataError
from dino_adapters.features.neighbours import CHUNK_CELLS, STEPS, nearest
from dino_adapters.features.pool import unit_rows
from dino_adapters.measure.intervals import units_of
from dino_adapters.measure.metrics import balanced_accuracy
from dino_adapters.runtime.chance import numpy_generator
from dino_adapters.runtime.console import Notices

NEIGHBOURS, TEMPERATURE = 10, 0.07
STRENGTHS = (0.01, 0.1, 1.0)
USUAL = 0.1
"""The one of them that sizes and looks are compared by: all three would take thrice the time."""
FOLDS = 3
LEAST_CHANGED = 6
"""If fewer groups are answered otherwise, all for the better, chance does so in more than one case
of twenty (sign test: 2 / 2^5 = 0.06); neither resampling nor a t-test sees that."""
MOST_ITERATIONS = 1000


def knn(bank: np.ndarray, labels: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Classes `(q,)` by cosine k-NN, k = 10, temperature 0.07.

    Each neighbour votes with exp(similarity / temperature). Source: Wu et al. (arXiv 1805.01978,
    section 3.4), as DINO uses it (arXiv 2104.14294).

    Args:
        bank: Vectors `(n, D)`, finite.
        labels: Their classes `(n,)`.
        x: Queries `(q, D)`, finite.
    """
    names, codes = np.unique(labels, return_inverse=True)
    queries, k = torch.from_numpy(x), min(NEIGHBOURS, len(bank))
    indices, values = nearest(queries, torch.from_numpy(bank), k)
    return names[_vote(values.double(), indices, codes)]


def findable(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which images can be asked for with their own group left out: bool `(n,)`.

    Classes of a single group have nothing to be found by.

    Raises:
        DataError: no class has two groups.
    """
    names, codes = np.unique(labels, return_inverse=True)
    _, group = np.unique(groups, return_inverse=True)
    pairs = np.unique(np.stack([codes, group]), axis=1)
    found = np.bincount(pairs[0], minlength=len(names))[codes] > 1
    if not found.any():
        raise DataError(
            "No class has images of two groups, so nothing can be chosen by them. Label images of "
            "more groups."
        )
    return found


def held_out_knn(x: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which labelled vectors k-NN among the others names rightly, own groups left out: bool `(n,)`.

    Args:
        x: Vectors `(n, D)`, finite.
        labels: Classes `(n,)`.
        groups: Groups `(n,)`.
    """
    _, codes = np.unique(labels, return_inverse=True)
    _, group = np.unique(groups, return_inverse=True)
    unit = torch.from_numpy(unit_rows(x.astype(np.float64)))
    found = []
    rows = max(CHUNK_CELLS // len(x), 1)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        # Rounded as in `nearest`: equal vectors tie, and ties go to the lower index.
        similar = (unit[part] @ unit.T * STEPS).round() / STEPS
        similar[torch.from_numpy(group[part, None] == group)] = -torch.inf
        values, indices = similar.sort(dim=1, descending=True, stable=True)
        found.append(_vote(values[:, :NEIGHBOURS], indices[:, :NEIGHBOURS], codes))
    return np.concatenate(found) == codes


def held_out_linear(
    x: np.ndarray, labels: np.ndarray, groups: np.ndarray, notices: Notices
) -> np.ndarray:
    """The same by the linear probe, a third of the groups left out in turn: bool `(n,)`.

    Args:
        x: Vectors `(n, D)`, finite.
        labels: Classes `(n,)`.
        groups: Groups `(n,)`.
        notices: Counts fits that did not converge.
    """
    z, _ = _standardised(x, x[:0])
    return _cross_validated(z, labels, groups, notices, USUAL) == labels


def linear_probe(
    bank: np.ndarray, labels: np.ndarray, groups: np.ndarray, x: np.ndarray, notices: Notices
) -> tuple[np.ndarray, float]:
    """Classes `(q,)` by logistic regression, all classes weighing alike, and its strength C.

    Columns are standardised with mean and spread of the labelled vectors. C is 0.01, 0.1 or 1:
    whichever does best among the labelled vectors with a third of the groups left out in turn
    (equal scores: the smaller).

    Args:
        bank: Vectors `(n, D)`, finite.
        labels: Their classes `(n,)`.
        groups: Their groups `(n,)`.
        x: Queries `(q, D)`, finite.
        notices: Counts fits that did not converge.
    """
    z, asked = _standardised(bank, x)
    scores = {
        strength: balanced_accuracy(labels, _cross_validated(z, labels, groups, notices, strength))
        for strength in STRENGTHS
    }
    strength = max(scores, key=lambda one: (scores[one], -one))
    return _fit(z, labels, asked, strength, notices), strength


def mean_recall(right: np.ndarray, labels: np.ndarray) -> float:
    """Balanced accuracy of answers known to be right or wrong: bool `(n,)`, classes `(n,)`."""
    return float(np.mean([right[labels == name].mean() for name in np.unique(labels)]))


def recall_weights(labels: np.ndarray) -> np.ndarray:
    """What makes the mean over images `(n,)` of these classes a balanced accuracy."""
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[codes])


def gains_of_groups(
    now: np.ndarray, before: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """What each group adds to the gain in balanced accuracy, times the number of images.

    Args:
        now: Right or wrong, bool `(2, n)`, of two probes whose gains are averaged.
        before: The same of others, about the same images.
        labels: Classes `(n,)`, which count alike.
        groups: Groups `(n,)`.
    """
    names, unit = units_of(groups)
    difference = now.astype(float).mean(axis=0) - before.astype(float).mean(axis=0)
    return np.bincount(unit, difference * recall_weights(labels), len(names))


def how_many_changed(gains: np.ndarray) -> int:
    """Groups whose gain is not 0, but for rounding."""
    return int(np.count_nonzero(np.abs(gains) > 1e-9))


def shown_better(
    now: np.ndarray, before: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> bool:
    """Whether answers are right more often beyond chance: paired t-test over groups, 95 %.

    Nothing is shown where fewer than `LEAST_CHANGED` groups have a gain or a loss.

    Args:
        now: As for `gains_of_groups`.
        before: As there.
        labels: As there.
        groups: As there.
    """
    gains = gains_of_groups(now, before, labels, groups)
    if how_many_changed(gains) < LEAST_CHANGED:
        return False
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return bool(gains.mean() > stats.t.ppf(0.975, len(gains) - 1) * error)


def _standardised(bank: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the mean and spread of the first, along the axes on which its vectors lie."""
    wide = bank.astype(np.float64)
    mean, spread = wide.mean(axis=0), wide.std(axis=0)
    # A constant column would explode with the first query that differs: it is left out.
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-8)
    # Neither a rotation nor axes along which no labelled vector lies change a fit with an L2
    # penalty; without them far fewer numbers are fitted.
    _, _, axes = np.linalg.svd((wide - mean) * scale, full_matrices=False)
    return ((wide - mean) * scale) @ axes.T, ((x.astype(np.float64) - mean) * scale) @ axes.T


def _cross_validated(
    z: np.ndarray, labels: np.ndarray, groups: np.ndarray, notices: Notices, strength: float
) -> np.ndarray:
    """Classes `(n,)`, every image named by the fold that it was held out of."""
    folds, found = _folds(labels, groups), labels.copy()
    for fold in np.unique(folds):
        out = folds == fold
        found[out] = _fit(z[~out], labels[~out], z[out], strength, notices)
    return found


def _folds(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Number of its fold for each image: whole groups, those of a class dealt to all folds."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    drawn = numpy_generator(0, "folds").permutation(len(first))
    place = np.empty(len(first), dtype=np.int64)
    place[np.lexsort((drawn, labels[first]))] = np.arange(len(first))
    return (place % FOLDS)[group]


def _fit(
    z: np.ndarray, labels: np.ndarray, asked: np.ndarray, strength: float, notices: Notices
) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    names = np.unique(labels)
    if len(names) == 1 or not len(asked):  # a fold may have taken all other classes
        return np.repeat(names[:1], len(asked))
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted below
        model.fit(z, labels)
    if int(np.max(model.n_iter_)) >= MOST_ITERATIONS:
        notices.add("linear probes that did not converge, taken as they were")
    return np.asarray(model.predict(asked))


def _vote(similarities: Tensor, indices: Tensor, codes: np.ndarray) -> np.ndarray:
    """Class numbers `(q,)` from similarities and places `(q, k)`, the most similar one first."""
    # Relative to the best: exp(1 / 0.001) would overflow, and the winner is the same.
    powers = ((similarities - similarities[:, :1]) / TEMPERATURE).exp()
    votes = torch.zeros((len(powers), int(codes.max()) + 1), dtype=powers.dtype)
    votes.scatter_add_(1, torch.from_numpy(codes)[indices], powers)
    return votes.argmax(dim=1).numpy()

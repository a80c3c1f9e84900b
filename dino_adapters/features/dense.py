"""Whether patch features keep their meaning place by place: labels, neighbours, similarity maps.

Long training makes the similarity maps of patches noisy while the class token still improves
(DINOv3, arXiv 2508.10104, section 4). These functions put numbers on that, of one image at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_adapters.contracts import DataError, RecipeError, ShapeError
from dino_adapters.features.neighbours import nearest

FLAT = 1e-9
"""Similarities that spread less than this differ by rounding alone."""


def patch_labels(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The label that most pixels of each patch carry.

    Args:
        mask: `(H, W)` integers; below 0 means that nobody labelled the pixel, and it has no vote.
        grid: `(h, w)` patches, at most `(H, W)`. Where a side is no multiple, patches differ by
            a pixel.

    Returns:
        int64 `(N,)`, N = h * w, row-major. Ties go to the lower label; a patch without labelled
        pixels gets -1.

    Raises:
        ShapeError: the mask is not `(H, W)` integers, or the grid is finer than the mask.
    """
    if mask.ndim != 2 or mask.is_floating_point():
        raise ShapeError(
            f"The mask is {tuple(mask.shape)} of {mask.dtype}. Give one whole number a pixel: "
            "(H, W)."
        )
    if not (1 <= grid[0] <= mask.shape[0] and 1 <= grid[1] <= mask.shape[1]):
        raise ShapeError(
            f"The grid is {grid} and the mask is {tuple(mask.shape)}. Every patch needs a pixel: "
            "give a larger mask or a coarser grid."
        )
    mask = mask.long()
    rows, columns = (
        torch.arange(side, device=mask.device) * patches // side
        for side, patches in zip(mask.shape, grid, strict=True)
    )
    patch = rows[:, None] * grid[1] + columns
    labelled = mask >= 0
    labels = int(mask.max()) + 1
    if labels <= 0:
        return mask.new_full((grid[0] * grid[1],), -1)
    cells = patch[labelled] * labels + mask[labelled]
    counts = torch.bincount(cells, minlength=grid[0] * grid[1] * labels).view(-1, labels)
    return torch.where(counts.sum(dim=1) > 0, _first_largest(counts), -1)


def segment_by_neighbours(
    train_patches: Tensor,
    train_labels: Tensor,
    test_patches: Tensor,
    *,
    classes: int,
    k: int = 10,
    temperature: float = 0.07,
) -> Tensor:
    """A class for every patch, by the votes of the most similar labelled patches.

    Each neighbour votes with exp(cosine / temperature), as in the k-NN classification of Wu et al.
    (arXiv 1805.01978, section 3.4). Nothing is fitted: the numbers are those of the features.

    Args:
        train_patches: `(M, D)`, any float dtype.
        train_labels: `(M,)` integers below `classes`; patches with a label below 0 are left out.
        test_patches: `(K, D)`, on the same device.
        classes: number of classes.
        k: neighbours that vote, 1 to the number of labelled patches.
        temperature: above 0; smaller lets the nearest ones decide.

    Returns:
        int64 `(K,)`; ties go to the lower class.

    Raises:
        ShapeError: lengths or widths differ, or there are fewer than k labelled patches.
        DataError: a label is `classes` or more, or a vector is not finite.
        RecipeError: the temperature is not above 0.
    """
    if train_labels.shape != train_patches.shape[:1]:
        raise ShapeError(
            f"There are {tuple(train_labels.shape)} labels and {tuple(train_patches.shape)} "
            "patches. Give (M,) labels and (M, D) patches."
        )
    if not temperature > 0.0:
        raise RecipeError(f"temperature is {temperature}. Use one above 0 (DINO: 0.07).")
    labelled = train_labels >= 0
    bank, labels = train_patches[labelled], train_labels[labelled].long()
    if len(labels) and int(labels.max()) >= classes:
        raise DataError(
            f"A patch has label {int(labels.max())} and there are {classes} classes. Labels run "
            f"from 0 to {classes - 1}; give what has no class a label below 0."
        )
    indices, similarities = nearest(test_patches, bank, k)
    # Relative to the best, so that no small temperature overflows.
    powers = ((similarities - similarities[:, :1]) / temperature).double().exp()
    votes = powers.new_zeros((len(test_patches), classes))
    votes.scatter_add_(1, labels[indices], powers)
    return _first_largest(votes)


def patch_consistency(patches_a: Tensor, patches_b: Tensor) -> float:
    """How far two views of one image agree on which of its patches are alike.

    The Pearson correlation of the cosines of all pairs of patches in one view with those in the
    other. Features may turn or change scale between the views; only the pattern of similarities
    counts, as in Gram anchoring. Take the mean over images.

    Args:
        patches_a: `(N, D)`, N of 3 or more.
        patches_b: `(N, E)`: the same places in the same order, from another view: other colours,
            or the mirrored image, its patches mirrored back. E may differ from D.

    Returns:
        -1 to 1; 1 = the same pattern. NaN where all pairs of a view are equally similar, as after
        a collapse: there is no pattern then.

    Raises:
        ShapeError: not two matrices of the same number of rows, 3 or more.
        DataError: a vector is not finite.
    """
    if patches_a.ndim != 2 or patches_b.ndim != 2 or len(patches_a) != len(patches_b):
        raise ShapeError(
            f"The views have patches {tuple(patches_a.shape)} and {tuple(patches_b.shape)}. Give "
            "(N, D) each, with the same N places in the same order."
        )
    if len(patches_a) < 3:
        raise ShapeError(
            f"There are {len(patches_a)} patches. A pattern of similarities needs 3 or more: use "
            "larger images."
        )
    a, b = _pairs(patches_a), _pairs(patches_b)
    a, b = a - a.mean(), b - b.mean()
    if float(a.abs().max()) < FLAT or float(b.abs().max()) < FLAT:
        return float("nan")
    return float((a @ b / (a.norm() * b.norm())).clamp(-1.0, 1.0))


def local_share(patches: Tensor, grid: tuple[int, int]) -> float:
    """How much more alike neighbouring patches are than any two patches of the image.

    Healthy maps are smooth and local: neighbours agree and the image as a whole does not. Noise
    and collapse both bring the difference to 0.

    Args:
        patches: `(N, D)`, N = h * w, row-major.
        grid: `(h, w)`, two patches or more.

    Returns:
        Mean cosine of patches that share a side, less the mean cosine of all pairs of different
        patches: -2 to 2.

    Raises:
        ShapeError: the patches do not fill the grid, or there is only one.
        DataError: a vector is not finite.
    """
    if patches.ndim != 2 or len(patches) != grid[0] * grid[1] or len(patches) < 2:
        raise ShapeError(
            f"The patches are {tuple(patches.shape)} and the grid is {grid}. Give (h * w, D) with "
            "two patches or more."
        )
    unit = _unit(patches)
    count = len(unit)
    # The sum over all ordered pairs without a matrix of them, less that of each with itself.
    everywhere = (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))
    places = unit.unflatten(0, grid)
    across = (places[:, 1:] * places[:, :-1]).sum(-1)
    down = (places[1:] * places[:-1]).sum(-1)
    return float(torch.cat([across.flatten(), down.flatten()]).mean() - everywhere)


def _pairs(patches: Tensor) -> Tensor:
    """Cosines of all pairs of different rows, each once: float64 `(N * (N - 1) / 2,)`."""
    unit = _unit(patches)
    first, second = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    return (unit @ unit.mT)[first, second]


def _unit(patches: Tensor) -> Tensor:
    """Rows in float64 at unit length; zero rows stay zero."""
    if not bool(torch.isfinite(patches).all()):
        raise DataError("A patch holds numbers that are not finite. Leave this image out.")
    return F.normalize(patches.double(), dim=1)


def _first_largest(rows: Tensor) -> Tensor:
    """Column of the largest number of each row, the first of equals on every device."""
    return (rows == rows.amax(dim=1, keepdim=True)).int().argmax(dim=1)

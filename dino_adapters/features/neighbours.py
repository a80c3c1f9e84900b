"""Exact nearest neighbours, in chunks of constant memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dino_adapters.contracts import DataError, ShapeError

Metric = Literal["cosine", "l2"]
CHUNK_CELLS = 2**23
"""Similarities held at once: 64 MiB in float64."""
STEPS = 2.0**40
"""Similarities are rounded to one part in this many: coarser than what rounding errors of float64
can decide, finer than what float32 vectors tell apart, even almost equal ones of untrained nets."""


def nearest(
    queries: Tensor, bank: Tensor, k: int, *, metric: Metric = "cosine"
) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of every query, most similar first.

    Products are taken in float64 and rounded a little. Equal vectors then get equal similarities
    wherever they stand in a chunk, and ties go to the lower index: results do not depend on how
    many queries are asked at once.

    Args:
        queries: `(Q, D)`, any float dtype.
        bank: `(n, D)`, on the same device.
        k: 1 to n.
        metric: `cosine`, or `l2` for the negative Euclidean distance.

    Returns:
        Indices int64 `(Q, k)` and similarities float32 `(Q, k)`.

    Raises:
        ShapeError: widths differ, or k is outside 1 to n.
        DataError: a vector is not finite.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ShapeError(
            f"queries are {tuple(queries.shape)} and the bank is {tuple(bank.shape)}. Both must be "
            "(rows, D) with the same D."
        )
    if not 1 <= k <= len(bank):
        raise ShapeError(f"k is {k} and the bank has {len(bank)} rows. Choose k from 1 to that.")
    bank, queries = bank.double(), queries.double()
    if not (bool(torch.isfinite(bank).all()) and bool(torch.isfinite(queries).all())):
        raise DataError("A vector holds numbers that are not finite. Leave those images out.")
    if metric == "cosine":
        # Not F.normalize: its floor of 1e-12 is not the exact zero that a zero vector should give.
        bank, queries = _unit(bank), _unit(queries)
    rows = max(CHUNK_CELLS // len(bank), 1)
    found = [_top(_similarities(part, bank, metric), k) for part in queries.split(rows)]
    if not found:
        empty = queries.new_empty((0, k))
        return empty.long(), empty.float()
    indices, values = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(values).float()


def _similarities(queries: Tensor, bank: Tensor, metric: Metric) -> Tensor:
    products = queries @ bank.mT
    if metric == "cosine":
        return (products * STEPS).round() / STEPS
    lengths = bank.square().sum(1)
    query_lengths = queries.square().sum(1, keepdim=True)
    squares = query_lengths + lengths - 2.0 * products
    # What cancellation leaves is of the order of the lengths, so they set the grid.
    step = ((query_lengths + lengths.max()) / STEPS).clamp_min(1e-300)
    return -((squares / step).round().clamp_min(0.0) * step).sqrt()


def _top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with ties by index; `topk` alone leaves the choice open."""
    threshold = similarities.topk(k, dim=1).values[:, -1:]
    above = similarities > threshold
    level = similarities == threshold
    room = k - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1) <= room))
    indices = chosen.nonzero()[:, 1].view(len(similarities), k)
    values = similarities.gather(1, indices)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return indices.gather(1, order), values


def _unit(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms == 0.0, torch.ones_like(norms), norms)

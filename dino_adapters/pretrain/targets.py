"""The teacher's targets: soft assignments of images to prototypes, balanced or centred."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain.losses import exact
from dino_adapters.pretrain.ranks import ALONE, Ranks


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, *, temperature: float, rounds: int = 3, ranks: Ranks = ALONE
) -> Tensor:
    """Sinkhorn-Knopp balancing (SwAV, arXiv 2006.09882, eq. 3-5), in the log domain.

    Each round scales the prototypes to equal use over all ranks, then each row to sum one:
    `g_k = -LSE_b(z_bk / T + f_b)`, `f_b = -LSE_k(z_bk / T + g_k)`. The usual form with `exp`
    overflows in fp32 at logits of 88.7 T; this one does not, and is equal elsewhere.

    Args:
        logits: `(B, K)`, the rows of this rank that share one balance. B may differ between
            ranks; a rank without rows passes `(0, K)` and must call this, too.
        temperature: the teacher's T.
        rounds: how often both scalings are done.
        ranks: who shares the balance.

    Returns:
        Probabilities `(B, K)` in fp32 (float64 for float64 logits); each row sums to one. No rows
        in, no rows out.
    """
    z = exact(logits) / temperature
    rows = z.new_zeros(z.shape[0], 1)
    columns = z.new_zeros(1, z.shape[1])
    for _ in range(rounds):
        scaled = z + rows
        # A rank without rows brings the neutral elements: -inf to the maximum, 0 to the sum.
        top = torch.cat([scaled, z.new_full((1, z.shape[1]), -torch.inf)]).amax(0, keepdim=True)
        top = ranks.largest(top)
        columns = -(top + ranks.sum((scaled - top).exp().sum(0, keepdim=True)).log())
        rows = -torch.logsumexp(z + columns, dim=1, keepdim=True)
    return (z + columns + rows).exp()


@torch.no_grad()
def softmax_centering(logits: Tensor, center: Tensor, *, temperature: float) -> Tensor:
    """Targets by centring, `softmax((z - c) / T)` (DINO, arXiv 2104.14294, section 3.1).

    Args:
        logits: `(B, K)`, or any `(..., K)`.
        center: c, `(1, K)`, from `update_center`; zeros before the first step.
        temperature: the teacher's T.

    Returns:
        Probabilities of the logits' shape in fp32 (float64 for float64 logits).
    """
    return ((exact(logits) - center) / temperature).softmax(dim=-1)


@torch.no_grad()
def update_center(
    center: Tensor, logits: Tensor, *, momentum: float = 0.9, ranks: Ranks = ALONE
) -> Tensor:
    """The centre for the next step, `m c + (1 - m) mean(z)` (DINO, arXiv 2104.14294, eq. 4).

    Call it after `softmax_centering`: the targets of a step use the centre of the step before.
    Every row counts alike, whichever rank holds it.

    Args:
        center: `(1, K)` in fp32 or float64; not changed.
        logits: raw teacher logits `(B, K)` of this rank, B may be 0 and differ between ranks.
        momentum: m, 0..1.
        ranks: who shares the centre.

    Returns:
        `(1, K)` like `center`; unchanged if no rank has a row.

    Raises:
        ShapeError: the shapes do not fit.
    """
    if logits.ndim != 2 or center.shape != (1, logits.shape[1]):
        raise ShapeError(
            f"The centre is {tuple(center.shape)} and the logits are {tuple(logits.shape)}. "
            "Expected (1, K) and (B, K) with the same K."
        )
    z = exact(logits).to(center.dtype)
    # One message: the sum of the rows, and how many they were.
    packed = ranks.sum(torch.cat([z.sum(dim=0), z.new_tensor([float(len(z))])]))
    total, count = packed[:-1], packed[-1]
    moved = momentum * center + (1.0 - momentum) * (total / count.clamp(min=1.0))
    return torch.where(count > 0, moved, center)

"""The terms of the objective (DINOv3, arXiv 2508.10104): pure functions of logits and tokens.

All of them compute in at least fp32, whatever dtype comes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_adapters.contracts import ShapeError

TINY = 1e-8


def exact(values: Tensor) -> Tensor:
    """The values in fp32, or in float64 where they are that already."""
    return values if values.dtype == torch.float64 else values.float()


def dino_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.1, drop_diagonal: bool = False
) -> Tensor:
    """Cross-entropy of every student crop against every teacher crop of the same image.

    Mean over pairs `(s, t)` and images of `-Σ_k P[t, b, k] log softmax(z[s, b] / τ)_k`, computed as
    `LSE(z / τ) - Σ P z / τ`, which is the same as P sums to one (DINO, arXiv 2104.14294, eq. 3).

    Args:
        student: logits `(S, B, K)`.
        teacher: probabilities `(T, B, K)`; receive no gradient.
        temperature: the student's τ.
        drop_diagonal: leave out pairs of one and the same crop (`s == t`).

    Returns:
        Scalar >= 0.

    Raises:
        ShapeError: B or K differ.
    """
    if student.shape[1:] != teacher.shape[1:]:
        raise ShapeError(
            f"The student's logits are (crops, images, prototypes) {tuple(student.shape)} and the "
            f"teacher's {tuple(teacher.shape)}. Images and prototypes must agree."
        )
    z = exact(student) / temperature
    targets = exact(teacher.detach())
    entropy = torch.logsumexp(z, dim=-1)  # (S, B)
    agreement = torch.einsum("sbk,tbk->st", z, targets)
    pairs = entropy.sum(dim=1)[:, None] - agreement  # (S, T), summed over images
    count = pairs.numel()
    if drop_diagonal:
        shared = min(pairs.shape)
        total = pairs.sum() - pairs.diagonal().sum()
        count -= shared
    else:
        total = pairs.sum()
    return total / (student.shape[1] * max(count, 1))


def ibot_loss(
    student: Tensor, teacher: Tensor, weights: Tensor, crops: int, *, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy at masked patches (iBOT, arXiv 2111.07832, eq. 2).

    `1 / crops * Σ_i w_i * CE_i` with `w_i` = 1 / (masked patches of its crop). The
    divisor counts all global crops, also those without a mask, as in DINOv2 and DINOv3: with half
    of the crops masked, an untrained head gives about half of `log K`.

    Args:
        student: logits `(M, K)` of the masked patches.
        teacher: probabilities `(M, K)` at the same places; receive no gradient.
        weights: `(M,)`, see `masks.mask_weights`.
        crops: global crops of the step, masked or not.
        temperature: the student's τ.

    Returns:
        Scalar >= 0; 0 (with a gradient of zero) where nothing is masked.

    Raises:
        ShapeError: the shapes differ.
    """
    if student.shape != teacher.shape or student.shape[:1] != weights.shape:
        raise ShapeError(
            f"At masked patches the student has {tuple(student.shape)}, the teacher "
            f"{tuple(teacher.shape)} and there are {tuple(weights.shape)} weights. All three must "
            "count the same patches."
        )
    z = exact(student) / temperature
    cross_entropy = torch.logsumexp(z, dim=-1) - (z * exact(teacher.detach())).sum(dim=-1)
    return (cross_entropy * exact(weights)).sum() / crops


def koleo_loss(tokens: Tensor) -> Tensor:
    """Spreads class tokens on the sphere: `-mean log d_i` (KoLeo, arXiv 1806.03198, eq. 2).

    `d_i` is the distance of the normalised token i to its nearest neighbour in the batch; the
    gradient reaches both. A batch of one has no neighbour and gives 0.

    Args:
        tokens: class tokens `(B, D)` of one global crop of each image.

    Returns:
        Scalar; about 15 if all tokens are equal, negative if all are further than 1 apart.
    """
    if tokens.shape[0] < 2:
        return exact(tokens).sum() * 0.0
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        x = F.normalize(exact(tokens), dim=-1, eps=TINY)
        with torch.no_grad():
            cosine = x @ x.mT
            nearest = cosine.fill_diagonal_(float("-inf")).argmax(dim=1)
        distance = (x - x[nearest] + TINY).norm(dim=-1)
        return -(distance + TINY).log().mean()

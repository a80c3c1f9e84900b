"""The terms of the objective (DINOv3, arXiv 2508.10104): pure functions of logits and tokens.

All of them compute in at least fp32, whatever dtype comes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain.masks import mask_weights
from dino_adapters.pretrain.ranks import ALONE, Ranks

TINY = 1e-8


def exact(values: Tensor) -> Tensor:
    """The values in fp32, or in float64 where they are that already."""
    return values if values.dtype == torch.float64 else values.float()


def no_autocast(values: Tensor) -> torch.autocast:
    """A context in which matrix products keep the dtype of their arguments, too."""
    return torch.autocast(device_type=values.device.type, enabled=False)


def nothing(values: Tensor) -> Tensor:
    """A scalar 0 whose gradient is 0, for terms that have nothing to compare."""
    return exact(values).sum() * 0.0


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
    with no_autocast(z):
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


def ibot_dense_loss(
    student: Tensor, teacher: Tensor, masks: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """`ibot_loss` from logits of all patches: the masked ones are picked here.

    The mean of the cross-entropy over the masked patches of each crop, then the mean over all
    crops, also those without a mask. The same number as `ibot_loss` on the picked rows.

    Args:
        student: logits `(B, N, K)`.
        teacher: probabilities `(B, N, K)`; receive no gradient.
        masks: bool `(B, N)`.
        temperature: the student's τ.

    Returns:
        Scalar >= 0; 0 (with a gradient of zero) where nothing is masked.

    Raises:
        ShapeError: the shapes differ.
    """
    if student.shape != teacher.shape or student.shape[:2] != masks.shape:
        raise ShapeError(
            f"The student has {tuple(student.shape)}, the teacher {tuple(teacher.shape)}, the "
            f"masks {tuple(masks.shape)}. Expected (B, N, K) twice and (B, N)."
        )
    masks = masks.bool()
    return ibot_loss(
        student[masks],
        teacher[masks],
        mask_weights(masks, exact(student).dtype),
        len(masks),
        temperature=temperature,
    )


def koleo_loss(
    tokens: Tensor,
    *,
    neighbours: int = 1,
    group: int | None = None,
    ranks: Ranks = ALONE,
    floor: float = 0.0,
    kin: Tensor | None = None,
) -> Tensor:
    """Spreads class tokens on the sphere: `-mean log d_ij` (KoLeo, arXiv 1806.03198, eq. 2).

    `d_ij` is the distance of the normalised token i to its j-th nearest neighbour in its group;
    the gradient reaches both. A group of one has no neighbour and gives 0. Nearest neighbours are
    nearer in larger groups, so the value depends on the group's size.

    Args:
        tokens: class tokens `(B, D)` of one global crop of each image, B alike on all ranks.
        neighbours: how many of each token count.
        group: neighbours are looked for among this many consecutive rows of the list of all
            ranks' tokens; None for all of them.
        ranks: who shares the batch.
        floor: f >= 0 replaces d by `sqrt(d^2 + f^2)`. Without it (0, the published form) two
            nearly equal tokens have a gradient of `1 / d`, up to 1e8; with it, at most `1 / (2 f)`.
        kin: int64 `(B,)`: rows of the same number are no neighbours, as pushing near-duplicates
            apart teaches differences that are not there. A row without enough others adds 0.

    Returns:
        Scalar, the mean over the own rows; about 15 if all tokens are equal, negative if all are
        further than 1 apart.

    Raises:
        ShapeError: the groups do not divide the batch, or are too small for the neighbours.
    """
    count, total = tokens.shape[0], tokens.shape[0] * ranks.size
    members = total if group is None else group
    if total and (members < 1 or total % members):
        raise ShapeError(
            f"KoLeo groups of {members} were asked for in a batch of {total} tokens. The groups "
            "must divide the batch; choose a divisor, or none for the whole batch."
        )
    if not total or (members == 1 and neighbours == 1):
        return nothing(tokens)
    if not 1 <= neighbours < members:
        raise ShapeError(
            f"KoLeo was asked for {neighbours} neighbours in groups of {members} tokens. A token "
            f"has 1 to {members - 1} neighbours there; ask for fewer, or make the groups larger."
        )
    with no_autocast(tokens):
        x = F.normalize(exact(tokens), dim=-1, eps=TINY)
        everyone = ranks.rows(x)
        with torch.no_grad():
            places = torch.arange(total, device=x.device)
            own = places[ranks.rank * count :][:count, None]
            cosine = x @ everyone.mT  # (B, total)
            cosine.masked_fill_((own == places) | (own // members != places // members), -torch.inf)
            if kin is not None:
                cosine.masked_fill_(kin[:, None] == ranks.rows(kin), -torch.inf)
            similarity, nearest = cosine.topk(neighbours, dim=1)
        distance = (x[:, None] - everyone[nearest] + TINY).norm(dim=-1)  # (B, neighbours)
        if floor:
            distance = (distance.square() + floor**2).sqrt()
        found = similarity != -torch.inf  # NaN stays, to be noticed
        return -(distance + TINY).log().where(found, 0.0).mean()

"""Signs of health: numbers that say, without labels, whether features still tell images apart.

The loss is a poor guide, since Sinkhorn-Knopp moves its target. `look_at` reads the signs off a
teacher, `diagnosis` judges them. Everything is computed in fp32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_adapters.backbones.frozen import at_rest
from dino_adapters.contracts import Features, NotFiniteError, ShapeError
from dino_adapters.features.dense import patch_consistency
from dino_adapters.pretrain.losses import exact, no_autocast
from dino_adapters.pretrain.prototypes import ProjectionHead

TWIN = 0.975
"""Prototypes with a cosine above this count as one (partial collapse, arXiv 2410.14060)."""
BLOCK = (2048, 8192)
"""Prototypes compared at once: 64 MiB of cosines in fp32, however many there are."""
LEAST_PATCHES = 3
"""Fewer patches have no pattern of similarities."""


@torch.no_grad()
def rankme(x: Tensor) -> float:
    """Effective rank: exp of the entropy of normalised singular values (arXiv 2210.02885, eq. 1).

    The paper adds 1e-7 to each share against log 0; here 0 log 0 is 0, in float64.

    Args:
        x: vectors `(n, D)`, not centred, as in the paper.

    Returns:
        1 (all rows are multiples of one vector) to min(n, D); 0 where all rows are zero.

    Raises:
        ShapeError: not a matrix with rows.
    """
    _check_rows(x, 1)
    values = torch.linalg.svdvals(x.double())
    total = values.sum()
    return float(entropy(values / total).exp()) if total > 0 else 0.0


@torch.no_grad()
def cls_cosine(x: Tensor) -> float:
    """Mean cosine of two different rows of `(n, D)`: -1 / (n - 1) to 1; zero rows count as 0.

    Near 1, all images look alike to the network. So they do to an untrained one: compare with the
    start.

    Raises:
        ShapeError: not a matrix, or fewer than two rows.
    """
    _check_rows(x, 2)
    unit = F.normalize(x.double(), dim=1)
    # The sum over all ordered pairs without a matrix of them, less that of each with itself.
    pairs = unit.sum(0).square().sum() - unit.square().sum()
    return float(pairs / (len(x) * (len(x) - 1)))


def entropy(p: Tensor) -> Tensor:
    """`-Σ p log p` in nats over the last dimension, 0 log 0 being 0."""
    return torch.special.entr(exact(p)).sum(-1)


@torch.no_grad()
def row_entropy(p: Tensor) -> float:
    """Mean entropy in nats of the rows of `(n, K)`: 0 (one prototype each) to log K (uniform)."""
    _check_rows(p, 1)
    return float(entropy(p).mean())


@torch.no_grad()
def marginal_entropy(p: Tensor) -> float:
    """Entropy in nats of the mean row of `(n, K)`: near log K if all prototypes are used alike.

    At least `row_entropy`, and 0 if all rows choose the same prototype.
    """
    _check_rows(p, 1)
    return float(entropy(exact(p).mean(0)))


@torch.no_grad()
def prototypes_used(p: Tensor) -> int:
    """How many of K prototypes are the most likely one of at least one row of `(n, K)`; at most n.

    Raises:
        ShapeError: not a matrix with rows.
    """
    _check_rows(p, 1)
    return len(p.argmax(dim=1).unique())


@torch.no_grad()
def duplicate_prototypes(weights: Tensor, above: float = TWIN) -> float:
    """Share of prototypes that have a twin: another one at a cosine above `above`.

    Partial prototype collapse (arXiv 2410.14060) shows here long before features suffer. Lengths
    do not count; a prototype of zeros has no twin. All pairs are compared, in blocks.

    Args:
        weights: one prototype a row `(K, d)`.
        above: a cosine.

    Returns:
        0 to 1.

    Raises:
        ShapeError: not a matrix with rows.
    """
    _check_rows(weights, 1)
    with no_autocast(weights):
        unit = F.normalize(exact(weights), dim=1)
        twin = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
        for top in range(0, len(unit), BLOCK[0]):
            for left in range(top, len(unit), BLOCK[1]):  # cosines are symmetric: half will do
                near = unit[top : top + BLOCK[0]] @ unit[left : left + BLOCK[1]].mT > above
                if left == top:
                    near.fill_diagonal_(False)
                twin[top : top + BLOCK[0]] |= near.any(1)
                twin[left : left + BLOCK[1]] |= near.any(0)
    return float(twin.double().mean())


def dead_level(prototypes: int) -> float:
    """The DINO term of a student that knows nothing: log K, in nats.

    How far a healthy one can fall is `resolve.loss_floor`.
    """
    return math.log(prototypes)


@torch.no_grad()
def look_at(
    networks: nn.ModuleDict, images: Tensor, *, temperature: float, batch: int = 32
) -> dict[str, float]:
    """Signs of health of a teacher, read from some images and their mirror images.

    | key | what | of |
    |---|---|---|
    | `rankme` | effective rank of class tokens | `rankme` |
    | `cls_cosine` | between class tokens of different images | `cls_cosine` |
    | `cls_patch_cosine` | between a class token and its image's patches, mean | -1 to 1 |
    | `patch_consistency` | of an image with its mirror image, mean | `dense.patch_consistency` |
    | `row_entropy`, `marginal_entropy` | in nats, of softmax(scores / temperature) | class tokens |
    | `prototypes_used` | that are first choice of an image, at most n | class tokens |
    | `prototypes_duplicated` | share that has a twin | `duplicate_prototypes` |

    Assignments are those before Sinkhorn-Knopp, whose balance would hide a collapse.

    Args:
        networks: `backbone` and, unless features alone are taught, `dino_head`. They are put into
            eval mode for the look, and left as they were found.
        images: normalised `(n, C, S, S)`, n of 2 or more, on any device.
        temperature: the teacher's, at this step.
        batch: images that go through the network at once.

    Returns:
        The signs by name. Those of prototypes are missing without a head, and `patch_consistency`
        with fewer than 3 patches. It is the mean over images that have a pattern of similarities,
        and NaN if none has.

    Raises:
        ShapeError: not two images or more.
        NotFiniteError: the teacher's features are not finite.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ShapeError(
            f"A look was asked for at images {tuple(images.shape)}. Give (n, C, S, S) with two "
            "images or more."
        )
    device = next((p.device for p in networks.parameters()), images.device)
    tokens, closeness, agreement = [], [], []
    with at_rest(networks):
        for part in images.split(batch):
            plain = part.to(device)
            seen, mirrored = (networks["backbone"](view) for view in (plain, plain.flip(-1)))
            cls, patches = exact(seen.cls), exact(seen.patches)
            _check_finite(cls, patches, mirrored.patches)
            tokens.append(cls)
            closeness.append(F.cosine_similarity(cls[:, None], patches, dim=-1).mean(1))
            agreement += _agreement(seen, mirrored)
        found = {
            "rankme": rankme(torch.cat(tokens)),
            "cls_cosine": cls_cosine(torch.cat(tokens)),
            "cls_patch_cosine": float(torch.cat(closeness).double().mean()),
        }
        if agreement:
            found["patch_consistency"] = float(torch.tensor(agreement).nanmean())
        if "dino_head" in networks:
            head = cast(ProjectionHead, networks["dino_head"])
            found |= _assignments(head, tokens, temperature)
    return found


def _agreement(seen: Features, mirrored: Features) -> list[float]:
    """`patch_consistency` of each image with its mirror image, whose patches are mirrored back."""
    if seen.patches.shape[1] < LEAST_PATCHES:
        return []
    back = mirrored.patches.unflatten(1, mirrored.grid).flip(2).flatten(1, 2)
    return [patch_consistency(a, b) for a, b in zip(seen.patches, back, strict=True)]


def _assignments(
    head: ProjectionHead, tokens: Sequence[Tensor], temperature: float
) -> dict[str, float]:
    """Signs of the prototypes, from class tokens in batches; memory is n x K numbers."""
    scores = torch.cat([exact(head(part)) for part in tokens])
    p = (scores / temperature).softmax(dim=1)
    return {
        "row_entropy": row_entropy(p),
        "marginal_entropy": marginal_entropy(p),
        "prototypes_used": float(prototypes_used(p)),
        "prototypes_duplicated": duplicate_prototypes(cast(Tensor, head.last_layer.weight)),
    }


def _check_finite(*tokens: Tensor) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in tokens):
        raise NotFiniteError(
            "The teacher's features of some of the watched images are not finite, and training "
            "cannot mend that. Go back to an earlier checkpoint, or start anew with a lower "
            "optim.lr."
        )


def _check_rows(x: Tensor, least: int) -> None:
    if x.ndim != 2 or len(x) < least:
        raise ShapeError(
            f"The rows to look at are {tuple(x.shape)}. Give a matrix with {least} or more rows."
        )

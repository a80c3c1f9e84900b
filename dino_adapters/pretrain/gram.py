"""Gram anchoring: similarities between patches stay those of an earlier teacher (DINOv3, 4.2)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain.losses import exact, no_autocast, nothing

Level = Literal["image", "batch"]
Negatives = Literal["keep", "clip", "clip_teacher", "clip_shared"]


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    level: Level = "image",
    normalize: bool = True,
    negatives: Negatives = "keep",
) -> Tensor:
    """Mean squared difference of two Gram matrices (DINOv3, arXiv 2508.10104, eq. 3).

    The mean goes over all entries, the diagonal too, where the paper writes a Frobenius norm.

    Args:
        student: patch tokens `(B, N, D)`, or `(M, D)` picked from several images.
        teacher: tokens at the same places; another D is allowed. Receive no gradient.
        level: `image` has one N × N matrix for each image, `batch` one BN × BN for all. Tokens
            `(M, D)` no longer know their image and always have one matrix.
        normalize: L2-normalise every token first, so that entries are cosines.
        negatives: what happens to negative entries. `keep`: nothing. `clip`: set to 0 in both
            matrices. `clip_teacher`: in the teacher's only, which is what the reference does
            where its setting is named `remove_only_teacher_neg`. `clip_shared`: in the teacher's,
            and in the student's where both are negative, which is what that name is meant to do.

    Returns:
        Scalar >= 0; 0 (with a gradient of zero) for no tokens.

    Raises:
        ShapeError: the tokens are not at the same places.
    """
    if student.ndim not in (2, 3) or student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"The student's tokens are {tuple(student.shape)} and the Gram teacher's "
            f"{tuple(teacher.shape)}. Expected (B, N, D) or (M, D) at the same places; bring "
            "other grids to the student's with `resize_tokens`."
        )
    x, y = exact(student), exact(teacher.detach())
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    if level == "batch" or x.ndim == 2:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    with no_autocast(x):
        ours, theirs = x @ x.mT, y @ y.mT
    if not ours.numel():
        return nothing(student)
    if negatives == "clip":
        ours = ours.clamp(min=0.0)
    elif negatives == "clip_shared":
        ours = ours.masked_fill((ours < 0) & (theirs < 0), 0.0)
    if negatives != "keep":
        theirs = theirs.clamp(min=0.0)
    return (ours - theirs).square().mean()


def resize_tokens(
    tokens: Tensor,
    grid: tuple[int, int],
    to: tuple[int, int],
    *,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Patch tokens on another grid, before any normalisation (DINOv3, section 4.3).

    Args:
        tokens: `(B, h * w, D)`, row by row.
        grid: their `(h, w)`.
        to: the grid `(h', w')` to resample to; pixel areas are aligned, not corners.
        mode: the kernel.
        antialias: widen the kernel where the grid shrinks.

    Returns:
        `(B, h' * w', D)` in fp32 (float64 for float64 tokens); the tokens' values if the grids are
        equal.

    Raises:
        ShapeError: the tokens do not fill their grid.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise ShapeError(
            f"The tokens are {tuple(tokens.shape)} and their grid is {grid[0]}x{grid[1]}. "
            f"Expected (B, {grid[0] * grid[1]}, D)."
        )
    x = exact(tokens)
    if grid == to:
        return x
    maps = x.mT.unflatten(-1, grid)  # (B, D, h, w)
    resized = F.interpolate(maps, size=to, mode=mode, align_corners=False, antialias=antialias)
    return resized.flatten(2).mT

"""Which images of a batch are alike: KoLeo must not push near-duplicates apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_adapters.data.resize import unit_range
from dino_adapters.pretrain.ranks import ALONE, Ranks

CELLS = 16
ALIKE = 0.985
"""Correlation of grey thumbnails from which two images are one scene. Above it lie 3 of 793,170
pairs of aerial images (UC Merced), 4 of 169,653 pairs of photographs, and 3 of 79,800 pairs of
blood cells, whose backgrounds are much alike: re-encoded files and overlapping tiles."""
FLAT = 1e-3
"""Standard deviation in 0..1 below which an image is empty: all empty images are alike."""


def appearance(image: Tensor) -> Tensor:
    """What two images of one scene share: 16 x 16 grey cells, centred, of length 1.

    Args:
        image: a whole image `(C, h, w)`, uint8 or 0..1.

    Returns:
        float32 `(256,)`; all zero for an empty image.
    """
    grey = unit_range(image).mean(dim=0, keepdim=True)
    cells = F.adaptive_avg_pool2d(grey, CELLS).flatten()
    centred = cells - cells.mean()
    return centred * 0.0 if float(centred.std()) < FLAT else F.normalize(centred, dim=0)


@torch.no_grad()
def kin_of(looks: Tensor, families: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """A number for each image; near-duplicates, and images of one group, have the same.

    Two images belong together if they are one file, of one group (patient, place, slide), or look
    alike in 16 x 16 grey cells; so do all that are linked by such pairs.

    Args:
        looks: `(B, 256)`, the `appearance` of each image.
        families: int64 `(B,)`: the same for one file, and for files of one group.
        ranks: who shares the batch; each brings equally many images.

    Returns:
        int64 `(B,)`, comparable over all ranks.
    """
    everyone, theirs = ranks.rows(looks), ranks.rows(families)
    empty = (everyone == 0).all(dim=1)
    alike = everyone @ everyone.mT > ALIKE
    alike |= (theirs[:, None] == theirs) | (empty[:, None] & empty)
    return connected(alike)[ranks.rank * len(looks) :][: len(looks)]


def connected(links: Tensor) -> Tensor:
    """The least number among all that each item is linked to, over any number of links.

    Args:
        links: bool `(n, n)`, symmetric, True on the diagonal.

    Returns:
        int64 `(n,)`.
    """
    count = len(links)
    numbers = torch.arange(count, device=links.device)
    while True:
        seen = numbers.expand(count, count).masked_fill(~links, count).amin(dim=1)
        if torch.equal(seen, numbers):
            return numbers
        numbers = seen

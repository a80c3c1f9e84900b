"""Terms that may stand in KoLeo's place: they spread vectors without a nearest neighbour.

Both compute in at least fp32. Each rank brings equally many rows and returns its own share of a
mean over ranks, so that averaged gradients are those of the whole batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_adapters.pretrain.losses import TINY, exact, no_autocast, nothing
from dino_adapters.pretrain.ranks import ALONE, Ranks
from dino_adapters.runtime import chance

REACH = 5.0
POINTS = 17


def kde_loss(tokens: Tensor, *, concentration: float = 5.0, ranks: Ranks = ALONE) -> Tensor:
    """Mean log density of class tokens on the sphere, each as the others estimate it.

    `mean_i log mean_{j != i} exp(κ x_i · x_j)`: minus the entropy by a kernel density of von
    Mises-Fisher kernels, without their constant (Wang and Isola, arXiv 2005.10242, section 4.2,
    with the token itself left out). Midnight (arXiv 2504.05186) has a kernel density estimate in
    KoLeo's place; whether its form is this one was not checked.

    Args:
        tokens: class tokens `(B, D)` of one global crop of each image.
        concentration: κ > 0; larger looks at nearer neighbours only.
        ranks: who shares the batch.

    Returns:
        Scalar from -κ to κ, the mean over the own rows; κ if all tokens are equal, about
        `κ² / 2D` if they are spread evenly. 0 (with a gradient of zero) for a batch of one.
    """
    count, total = tokens.shape[0], tokens.shape[0] * ranks.size
    if total < 2:
        return nothing(tokens)
    with no_autocast(tokens):
        x = F.normalize(exact(tokens), dim=-1, eps=TINY)
        exponents = concentration * (x @ ranks.rows(x).mT)  # (B, total)
        places = torch.arange(total, device=x.device)
        own = places[ranks.rank * count :][:count, None]
        others = exponents.masked_fill(own == places, -torch.inf)
        return others.logsumexp(dim=1).mean() - math.log(total - 1)


def sigreg_loss(
    vectors: Tensor, *, step: int, directions: int = 1024, ranks: Ranks = ALONE
) -> Tensor:
    """Pulls vectors towards a standard normal distribution (SIGReg, LeJEPA, arXiv 2511.08544).

    The vectors are projected on random unit directions. For each, the empirical characteristic
    function φ, a mean over the batch of all ranks, is compared with that of N(0, 1) (Epps-Pulley):
    `∫ |φ(t) - exp(-t²/2)|² exp(-t²/2) dt` from -5 to 5 by trapezoids at 17 points; then the mean
    over directions. Unlike the statistic of the test, it is not multiplied by the batch size.

    Args:
        vectors: `(B, D)`, not normalised, B >= 1 and alike on all ranks.
        step: gives the directions, which are the same on all ranks and devices.
        directions: how many.
        ranks: who shares the batch.

    Returns:
        Scalar >= 0, the same on all ranks; about 1.06 / B for normal vectors.
    """
    with no_autocast(vectors):
        x = exact(vectors)
        draws = chance.generator(0, "sigreg", step)
        axes = torch.randn(directions, x.shape[1], generator=draws).to(x)
        shadows = x @ F.normalize(axes, dim=-1).mT  # (B, directions)
        # The integrand is even and 0 at t = 0: the right half of the points, with twice the weight.
        half = POINTS // 2
        points = torch.linspace(0.0, REACH, half + 1, dtype=x.dtype, device=x.device)
        normal = (-points.square() / 2).exp()
        steps = torch.full_like(points, 2 * REACH / half)
        steps[-1] = REACH / half
        angles = shadows[..., None] * points  # (B, directions, half + 1)
        wave = torch.stack([angles.cos().mean(dim=0), angles.sin().mean(dim=0)])
        real, imaginary = ranks.rows(wave[None]).mean(dim=0)
        gap = (real - normal).square() + imaginary.square()
        return (gap * (normal * steps)).sum(dim=-1).mean()

"""The teacher's targets: balanced soft assignments of images to prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_adapters.pretrain.losses import exact


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, *, temperature: float, rounds: int = 3) -> Tensor:
    """Sinkhorn-Knopp balancing (SwAV, arXiv 2006.09882, eq. 3-5), in the log domain.

    Each round scales the prototypes to equal use, then each row to sum one:
    `g_k = -LSE_b(z_bk / T + f_b)`, `f_b = -LSE_k(z_bk / T + g_k)`. The usual form with `exp`
    overflows in fp32 at logits of 88.7 T; this one does not, and is equal elsewhere.

    Args:
        logits: `(B, K)`, all rows that share one balance.
        temperature: the teacher's T.
        rounds: how often both scalings are done.

    Returns:
        Probabilities `(B, K)` in fp32 (float64 for float64 logits); each row sums to one. No rows
        in, no rows out.
    """
    z = exact(logits) / temperature
    if not len(z):
        return z
    rows = z.new_zeros(z.shape[0], 1)
    columns = z.new_zeros(1, z.shape[1])
    for _ in range(rounds):
        columns = -torch.logsumexp(z + rows, dim=0, keepdim=True)
        rows = -torch.logsumexp(z + columns, dim=1, keepdim=True)
    return (z + columns + rows).exp()

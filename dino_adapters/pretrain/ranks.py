"""What a term of the objective asks of the other processes: a sum, a maximum, all rows.

Terms that couple images (balanced targets, KoLeo and its kin) take a `Ranks`. One process is
`ALONE`; several are a `ProcessGroup`. All ranks must call the same methods in the same order, or
they wait for each other until the time limit of the process group.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Ranks(Protocol):
    """Processes that share one batch."""

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    @property
    def rank(self) -> int:
        """The number of this one, from 0."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum of one tensor of each rank, all of one shape; no gradient."""
        ...

    def largest(self, x: Tensor) -> Tensor:
        """Maximum of each element over the ranks; no gradient."""
        ...

    def rows(self, x: Tensor) -> Tensor:
        """Rows of all ranks in the order of ranks, `(n, ...)` to `(size * n, ...)`.

        Every rank must bring the same number. Differentiable: backward sums the gradients that all
        ranks have for a row and hands them to its owner. A mean over ranks of the parameters'
        gradients is then the gradient of the mean over ranks of their losses. All ranks must run
        backward if one does.
        """
        ...


class Alone:
    """One process: every answer is the question."""

    size = 1
    rank = 0

    def sum(self, x: Tensor) -> Tensor:
        """The tensor, without gradient."""
        return x.detach()

    def largest(self, x: Tensor) -> Tensor:
        """The tensor, without gradient."""
        return x.detach()

    def rows(self, x: Tensor) -> Tensor:
        """The tensor, with its gradient."""
        return x


ALONE = Alone()


class ProcessGroup:
    """The processes of a `torch.distributed` group (gloo or nccl) that is already running.

    Args:
        group: None for all processes.

    Raises:
        ValueError: No process group was started (by torch).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def sum(self, x: Tensor) -> Tensor:
        """See `Ranks.sum`."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """See `Ranks.largest`."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def rows(self, x: Tensor) -> Tensor:
        """See `Ranks.rows`."""
        gathered = _Rows.apply(x, self)
        assert isinstance(gathered, Tensor)
        return gathered

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        # A copy: torch reduces in place, and the caller's counts and sums are still theirs.
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, op=operation, group=self.group)
        return out


class _Rows(torch.autograd.Function):
    """All ranks' rows forward; the sum of all ranks' gradients of the own rows backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ProcessGroup) -> Tensor:
        ctx.ranks, ctx.count = ranks, x.shape[0]
        own = x.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(ranks.size)]
        dist.all_gather(parts, own, group=ranks.group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        total = ctx.ranks.sum(grad_outputs[0])
        first = ctx.ranks.rank * ctx.count
        return total[first : first + ctx.count], None

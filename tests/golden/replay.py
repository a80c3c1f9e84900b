"""Random numbers from a file instead of a generator."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .case import Case, Settings


class ReplayedDraws:
    """`backbones.draws.Draws` that pops stored draws, and insists on being asked the same."""

    def __init__(self, case: Case, draws: Sequence[Settings]) -> None:
        self._case = case
        self._left = deque(draws)

    def uniform(self, low: float, high: float, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """The next draw, which must have been uniform with these ends and this shape."""
        draw = self._next("uniform")
        asked, stored = (low, high, list(shape)), (draw["low"], draw["high"], draw["shape"])
        assert asked == stored, f"{draw['key']}: {asked} was asked for, {stored} is stored"
        return self._case.tensor(draw["key"]).to(like)

    def permutation(self, count: int, *, device: torch.device) -> Tensor:
        """The next draw, which must have been a permutation of as many."""
        draw = self._next("randperm")
        assert count == draw["n"], f"{draw['key']}: {count} asked for, {draw['n']} stored"
        return self._case.tensor(draw["key"]).to(device)

    def _next(self, kind: str) -> Settings:
        assert self._left, f"a {kind} was asked for after the last stored draw"
        draw = self._left.popleft()
        assert draw["kind"] == kind, f"{draw['key']} is a {draw['kind']}, a {kind} was asked for"
        return draw

    def finish(self) -> None:
        """Fails if the network drew less than the official one."""
        assert not self._left, f"{len(self._left)} draws were not asked for"

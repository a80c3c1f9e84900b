"""The kinds of metadata guides: how one factor is told from class tokens (arXiv 2606.05107)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_adapters.contracts import RecipeError
from dino_adapters.pretrain.losses import TINY, exact
from dino_adapters.pretrain.ranks import Ranks
from dino_adapters.recipes.continuing import GuideRecipe

NORM_MOMENTUM = 0.99


def ramp(share: float) -> float:
    """How far the network follows its guides, `2 / (1 + exp(-10 t)) - 1` (arXiv 1505.07818).

    Args:
        share: t, the share of the run since the backbone trains; 0 or less while it is frozen.

    Returns:
        0 for t <= 0; 0.46 at 0.1, 0.987 at 0.5, 0.99991 at 1.
    """
    return 2.0 / (1.0 + math.exp(-10.0 * share)) - 1.0 if share > 0 else 0.0


def steer(x: Tensor, factor: float) -> Tensor:
    """The same values, whose gradient is multiplied by a factor on its way back.

    A negative factor is gradient reversal (arXiv 1505.07818): what comes after learns to lower the
    loss, what comes before learns to raise it.
    """
    steered = _Steered.apply(x, factor)
    assert isinstance(steered, Tensor)
    return steered


class _Steered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.factor, None


class Guide(nn.Module):
    """One factor: how it is told from class tokens.

    Attributes:
        norm: moving average of the norm of its gradient; 0 before the first one.
        measured: int64, how many norms it is made of.
    """

    norm: Tensor
    measured: Tensor

    def __init__(self, recipe: GuideRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.register_buffer("norm", torch.zeros(()))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Back to the start: truncated normal of deviation 0.02 for weights, zeros for the rest."""
        for buffer in self.buffers():
            buffer.zero_()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def weigh(self, norm: Tensor) -> None:
        """Moves the average to the norm of a step, at a rate of 0.01 / (1 - 0.99^n).

        So the first norms count alike. An average that started at the very first would follow it
        for a hundred steps, and that of a new head is a small part of what it is ten steps later:
        its guide would outweigh the others.
        A norm of 0 is of a step without values, and says nothing.
        """
        # Written for tensors, so that a device need not be waited for.
        count = self.measured + (norm > 0)
        rate = (1 - NORM_MOMENTUM) / (1 - NORM_MOMENTUM ** count.clamp(min=1).to(norm.dtype))
        self.norm.copy_(torch.where(norm > 0, self.norm + rate * (norm - self.norm), self.norm))
        self.measured.copy_(count)

    def known(self, target: Tensor) -> Tensor:
        """Which images count, bool `(B,)`."""
        return target >= 0

    def errors(self, cls: Tensor, target: Tensor) -> Tensor:
        """The loss of every token, `(G, B)`, finite where an image does not count, too."""
        raise NotImplementedError

    def note(self, cls: Tensor, target: Tensor) -> None:
        """Sees the teacher's class tokens `(G, B, D)`."""

    def move(self, ranks: Ranks) -> None:
        """Learns from what was noted, once the step is applied."""

    def forget(self) -> None:
        """Drops what was noted."""


class Prototypical(Guide):
    """Nearest class centre: `-log softmax(cos(φ, p_m) / τ)` over classes that were seen.

    Args:
        recipe: temperature τ and momentum of the centres.
        classes: M.
        dim: D of the tokens.

    Attributes:
        bank: centres `(M, D)` of length 1; zeros for a class that no step has seen.
    """

    bank: Tensor

    def __init__(self, recipe: GuideRecipe, classes: int, dim: int) -> None:
        super().__init__(recipe)
        self.register_buffer("bank", torch.zeros(classes, dim))
        self._sums: Tensor | None = None  # (M, D + 1): sums of tokens, and how many they are

    def seen(self) -> Tensor:
        """Which classes have a centre, bool `(M,)`."""
        return self.bank.ne(0).any(dim=1)

    def known(self, target: Tensor) -> Tensor:
        """Images of a class that has a centre."""
        return (target >= 0) & self.seen()[target.clamp(min=0)]

    def errors(self, cls: Tensor, target: Tensor) -> Tensor:
        """See `Guide.errors`."""
        logits = F.normalize(cls, dim=-1, eps=TINY) @ self.bank.mT / self.recipe.temperature
        seen = self.seen()
        # Without any centre no image counts, and the logits only have to be finite.
        rivals = logits.masked_fill(~seen & seen.any(), -torch.inf)
        places = target.clamp(min=0).expand(cls.shape[:-1])
        own = logits.gather(-1, places[..., None]).squeeze(-1)
        return rivals.logsumexp(dim=-1) - own

    @torch.no_grad()
    def note(self, cls: Tensor, target: Tensor) -> None:
        """Adds tokens of length 1 to the sums of their classes."""
        tokens = F.normalize(exact(cls).to(self.bank.dtype), dim=-1, eps=TINY)
        rows = F.pad(tokens, (0, 1), value=1.0) * (target >= 0)[:, None]
        if self._sums is None:
            self._sums = self._nothing()
        places = target.clamp(min=0).expand(cls.shape[:-1])
        self._sums.index_add_(0, places.flatten(), rows.flatten(0, 1))

    @torch.no_grad()
    def move(self, ranks: Ranks) -> None:
        """Centres move to the mean of the step's tokens, those of all ranks alike."""
        sums = ranks.sum(self._nothing() if self._sums is None else self._sums)
        count = sums[:, -1:]
        mean, momentum = sums[:, :-1] / count.clamp(min=1), self.recipe.momentum
        moved = torch.where(
            self.seen()[:, None], momentum * self.bank + (1 - momentum) * mean, mean
        )
        moved = F.normalize(moved, dim=-1, eps=TINY)
        self.bank.copy_(torch.where(count > 0, moved, self.bank))

    def forget(self) -> None:
        """See `Guide.forget`."""
        self._sums = None

    def _nothing(self) -> Tensor:
        return self.bank.new_zeros(self.bank.shape[0], self.bank.shape[1] + 1)


class Classification(Guide):
    """An MLP over M classes, and cross-entropy."""

    def __init__(self, recipe: GuideRecipe, classes: int, dim: int) -> None:
        super().__init__(recipe)
        self.mlp = _mlp(dim, recipe.hidden_dim, classes)

    def errors(self, cls: Tensor, target: Tensor) -> Tensor:
        """See `Guide.errors`."""
        places = target.clamp(min=0).expand(cls.shape[:-1])
        return F.cross_entropy(self.mlp(cls).movedim(-1, 1), places, reduction="none")


class Regression(Guide):
    """An MLP to a number from 0 to 1, and squared error."""

    def __init__(self, recipe: GuideRecipe, dim: int) -> None:
        super().__init__(recipe)
        self.mlp = _mlp(dim, recipe.hidden_dim, 1)

    def known(self, target: Tensor) -> Tensor:
        """Images with a number."""
        return ~target.isnan()

    def errors(self, cls: Tensor, target: Tensor) -> Tensor:
        """See `Guide.errors`."""
        number = self.mlp(cls).squeeze(-1).sigmoid()
        return (number - target.nan_to_num(0.0).to(number.dtype)).square()


def _mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, out),
    )


def make_guide(recipe: GuideRecipe, classes: Mapping[str, int], dim: int) -> Guide:
    """The guide that a recipe describes, before `reset_parameters`.

    Args:
        recipe: its kind and settings.
        classes: M of each column of classes.
        dim: D of the class tokens.

    Raises:
        RecipeError: its column was not read as classes, and its kind needs them.
    """
    if recipe.kind == "regression":
        return Regression(recipe, dim)
    if recipe.column not in classes:
        raise RecipeError(
            f"The guide of '{recipe.column}' is a {recipe.kind} one, and its column was not read "
            "as classes. Read the columns that columns_of(guides) names."
        )
    kind = Prototypical if recipe.kind == "prototypical" else Classification
    return kind(recipe, classes[recipe.column], dim)

"""Sections for training that starts from a trained network: adapters, anchor, guides."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dino_adapters.recipes.sections import Positive, Section


class LoraRecipe(Section):
    """Low-rank adapters in place of whole blocks (LoRA, arXiv 2106.09685).

    Adapters in all blocks but the last, which are trained whole with all norms, is the shape of
    ExPLoRA (arXiv 2406.10973).
    """

    rank: int = Field(default=8, ge=1)
    """Rank of the change that an adapter can make to a weight."""
    alpha: Positive = 16.0
    """The change is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = ("qkv",)
    """Linear layers of a block that get an adapter, by the last part of their names."""
    open_blocks: int = Field(default=1, ge=0)
    """The last so many blocks are trained whole, and get none."""
    norms: bool = True
    """Train all norms and gains, too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty. Name linear layers, such as qkv, proj, fc1 and fc2")
        return self


class AnchorRecipe(Section):
    """Ties class tokens to those of the network that the run started from.

    Patch tokens are tied by `gram` with `teacher=start`.
    """

    cls_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the mean of `1 - cos` between class tokens of the same global crops."""


class GuideRecipe(Section):
    """What is known about images besides pixels, attracting or repelling the class token.

    After FINO (arXiv 2606.05107). A factor that matters (species, region) may attract; one that
    should not (scanner, year) may repel through gradient reversal. Images without a value count
    for nothing.
    """

    column: str = Field(min_length=1)
    """Column of `data.metadata` that holds the values."""
    kind: Literal["prototypical", "classification", "regression"] = "prototypical"
    """Nearest class centre by cosine, an MLP over classes, or an MLP to a number. Centres follow
    the teacher and do not compete: hide with `classification` or `regression`."""
    effect: Literal["attract", "repel"] = "attract"
    """Whether the network learns to show the factor, or to hide it."""
    weight: float = Field(default=0.03, ge=0.0)
    """Weight of the guide's loss. What it asks of the network rises along
    `2 / (1 + exp(-10 t)) - 1`, t being the share of the run since the backbone trains; its own
    head learns at full weight."""
    temperature: Positive = 0.023
    """Divides cosines of a prototypical guide."""
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Of a prototypical guide's centres, moving averages of the teacher's class tokens."""
    hidden_dim: int = Field(default=256, ge=1)
    """Width of the MLP's two hidden layers."""

"""Metadata guides: what is known of images attracts or repels the class token (arXiv 2606.05107).

A guide tells a factor from class tokens of global crops, before the head. Its own head always
learns to tell it better. The network is asked to show the factor, or, by reversed gradients, to
hide it; this rises along `ramp` from 0. With two or more guides, none outweighs the others: each is
scaled by the norm of its gradient. Order of a step: `note_teacher` for all micro-batches, `agree`,
`total` for each micro-batch, then `after`, or `forget` where the step is refused.

Where this differs from FINO, or settles what its paper leaves open: the ramp also holds back
attraction (as in the authors' code); centres are means of teacher tokens of length 1, so that no
image counts more than others; a class counts from the step after its first sight on; averages of
norms are corrected for their start; the predicted number passes a sigmoid, as an unbounded error
could be raised forever by reversal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

import torch
from torch import Tensor, nn

from dino_adapters.contracts import RecipeError, ShapeError
from dino_adapters.data.metadata import Classes, Kind, Metadata
from dino_adapters.pretrain.guide_kinds import Guide, make_guide, ramp, steer
from dino_adapters.pretrain.losses import TINY, exact, no_autocast, nothing
from dino_adapters.pretrain.ranks import ALONE, Ranks
from dino_adapters.recipes.continuing import GuideRecipe
from dino_adapters.runtime.chance import generator


class Guides(nn.Module):
    """All guides of a run. Empty until `reset_parameters`; `make_guides` does both.

    Args:
        recipes: the guides, each on a column of its own.
        classes: M of each column of classes.
        dim: D of the class tokens.

    Raises:
        RecipeError: two guides share a column, or a number of classes is not given.
    """

    def __init__(
        self, recipes: Sequence[GuideRecipe], classes: Mapping[str, int], dim: int
    ) -> None:
        super().__init__()
        columns_of(recipes)  # refuses a column that is named twice
        self.each: dict[str, Guide] = {}
        for recipe in recipes:
            guide = make_guide(recipe, classes, dim)
            self.each[recipe.column] = guide
            # A name that neither dots, slashes nor the module's own attributes can break.
            self.add_module(f"column_{quote(recipe.column, safe='').replace('.', '%2E')}", guide)
        self.forget()

    def reset_parameters(self, seed: int) -> None:
        """All guides back to the start; each has draws of its own, whatever stands beside it."""
        for column, guide in self.each.items():
            guide.reset_parameters(generator(seed, f"guide {column}"))

    def note_teacher(self, cls: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Notes a micro-batch of the teacher: its tokens, and how many images count.

        Args:
            cls: the teacher's class tokens `(G, B, D)`.
            targets: of each column `(B,)`; see `targets_of`.
        """
        self._taught += cls.shape[1]
        for column, guide in self.each.items():
            target = self._target(targets, column, cls)
            guide.note(cls, target)
            self._known[column] = self._known.get(column, 0) + guide.known(target).sum()

    def agree(self, ranks: Ranks = ALONE) -> None:
        """Settles how many images of the step count, over all micro-batches and ranks.

        Every image with a value then weighs the same in `losses`. All ranks must call it.
        """
        assert self._taught, "note_teacher comes before agree"
        known = torch.stack([self._known[column] for column in self.each])
        total = ranks.sum(torch.cat([known, known.new_tensor([self._taught])]))
        self._shares = dict(zip(self.each, total[:-1] / total[-1], strict=True))

    def losses(self, cls: Tensor, targets: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """The unweighted loss of each guide, by column.

        The mean over crops and images with a value: those of the step after `agree`, so that
        micro-batches, weighted by their images, add up to the step; else those of this
        micro-batch. 0 with a gradient of 0 where none has a value. Gradients of the tokens are
        steered: times `ramp(share)`, and -1 for a guide that repels; those of heads are not.

        Args:
            cls: the student's class tokens of global crops `(G, B, D)`, before the head.
            targets: of each column `(B,)`: int64 codes, -1 without a value, or floats in [0, 1],
                NaN without one.
            share: see `ramp`.

        Raises:
            ShapeError: a column has no targets, or not one for each image.
        """
        return self._losses(self._steered(cls, share), targets)

    def weights(self) -> dict[str, Tensor]:
        """What each guide's loss is multiplied by, by column: its weight, balanced.

        The balance is (geometric mean of the norms) / (its norm), over guides that have a norm.
        """
        active = {c: g for c, g in self.each.items() if g.recipe.weight > 0}
        weights = {c: g.norm.new_tensor(g.recipe.weight) for c, g in self.each.items()}
        if len(active) < 2:
            return weights
        norms = torch.stack([guide.norm for guide in active.values()])
        measured = norms > TINY
        logs = norms.clamp(min=TINY).log()
        mean = torch.where(measured, logs, 0.0).sum() / measured.sum().clamp(min=1)
        balance = torch.where(measured, (mean - logs).exp(), 1.0)
        return weights | {
            column: weights[column] * balance[index] for index, column in enumerate(active)
        }

    def total(
        self, cls: Tensor, targets: Mapping[str, Tensor], share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of `losses`, and the unweighted losses by name, `guide/COLUMN`.

        With two or more guides, notes the norms of their gradients for `after`, where gradients
        are on.
        """
        steered = self._steered(cls, share)
        values = self._losses(steered, targets)
        weights = self.weights()
        if len(values) > 1 and torch.is_grad_enabled():
            self._measure(values, steered, cls.shape[1])
        total = nothing(cls)
        for column, value in values.items():
            total = total + weights[column] * value
        return total, {f"guide/{column}": value.detach() for column, value in values.items()}

    @torch.no_grad()
    def after(self, ranks: Ranks = ALONE) -> None:
        """Moves centres and norms by what the step's micro-batches noted. All ranks must call it.

        Nothing else changes them, so that a refused step leaves nothing behind.
        """
        for guide in self.each.values():
            guide.move(ranks)
        if len(self.each) > 1:
            first = next(iter(self.each.values())).norm
            noted = [self._squares.get(column, first.new_zeros(())) for column in self.each]
            total = ranks.sum(torch.stack([*noted, first.new_tensor(float(self._images))]))
            # Of the gradient of the step's loss, to which every image brings its share.
            norms = total[:-1].sqrt() / total[-1].clamp(min=1)
            for guide, norm in zip(self.each.values(), norms, strict=True):
                guide.weigh(norm)
        self.forget()

    def forget(self) -> None:
        """Drops what was noted: the step was refused."""
        self._known: dict[str, Tensor] = {}
        self._shares: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._taught = self._images = 0
        for guide in self.each.values():
            guide.forget()

    def _steered(self, cls: Tensor, share: float) -> dict[str, Tensor]:
        """Each guide's own view of the tokens, at which its gradient can be measured."""
        tokens, follow = exact(cls), ramp(share)
        if not tokens.requires_grad and torch.is_grad_enabled():
            tokens = tokens.detach().requires_grad_()  # a frozen backbone: heads learn all the same
        return {
            column: steer(tokens, -follow if guide.recipe.effect == "repel" else follow)
            for column, guide in self.each.items()
        }

    def _losses(
        self, steered: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        values = {}
        for column, guide in self.each.items():
            cls = steered[column]
            target = self._target(targets, column, cls)
            known = guide.known(target)
            with no_autocast(cls):
                errors = guide.errors(cls.to(guide.norm.dtype), target)
            share = self._shares.get(column)
            share = known.to(errors.dtype).mean() if share is None else share.to(errors.dtype)
            values[column] = torch.where(known, errors, 0.0).mean() / share.clamp(min=TINY)
        return values

    def _measure(
        self, values: Mapping[str, Tensor], steered: Mapping[str, Tensor], images: int
    ) -> None:
        self._images += images
        for column, value in values.items():
            (gradient,) = torch.autograd.grad(value, steered[column], retain_graph=True)
            square = (gradient * images).square().sum().to(self.each[column].norm.dtype)
            self._squares[column] = self._squares.get(column, 0) + square

    def _target(self, targets: Mapping[str, Tensor], column: str, cls: Tensor) -> Tensor:
        found = targets.get(column)
        if found is None or found.shape != cls.shape[1:2] or cls.ndim != 3:
            given = "none" if found is None else str(tuple(found.shape))
            raise ShapeError(
                f"The guide of '{column}' has the targets {given} for class tokens "
                f"{tuple(cls.shape)}. Expected (B,) and (G, B, D) with the same B."
            )
        return found


def columns_of(recipes: Sequence[GuideRecipe]) -> dict[str, Kind]:
    """The columns that guides need, and how each is read; for `data.metadata.read_metadata`.

    Raises:
        RecipeError: two guides share a column.
    """
    columns: dict[str, Kind] = {}
    for recipe in recipes:
        if recipe.column in columns:
            raise RecipeError(
                f"Two guides name the column '{recipe.column}'. Keep one of them, or copy the "
                "column under another name."
            )
        columns[recipe.column] = "numbers" if recipe.kind == "regression" else "classes"
    return columns


def make_guides(
    recipes: Sequence[GuideRecipe], metadata: Metadata, dim: int, *, seed: int
) -> Guides:
    """The guides of a run at their start.

    Args:
        recipes: what they do.
        metadata: the columns that `columns_of` names.
        dim: D of the class tokens.
        seed: of the run.

    Raises:
        RecipeError: two guides share a column, or a column was read as the wrong kind.
        UnknownNameError: a column was not read.
    """
    for column, kind in columns_of(recipes).items():
        if isinstance(metadata.column(column), Classes) != (kind == "classes"):
            raise RecipeError(
                f"The guide of '{column}' needs {kind}, and its column was read otherwise. Read "
                "the columns that columns_of(guides) names, as it says."
            )
    guides = Guides(recipes, metadata.classes(), dim)
    guides.reset_parameters(seed)
    return guides


def targets_of(
    metadata: Metadata, images: Sequence[int], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """What is known of images, by column: int64 codes or float32 numbers, `(B,)` each.

    Args:
        metadata: the columns.
        images: places of the images among the keys that the metadata was read for.
        device: where the tensors shall live.
    """
    return {
        name: torch.from_numpy(
            (column.codes if isinstance(column, Classes) else column.values)[list(images)]
        ).to(device)
        for name, column in metadata.columns.items()
    }

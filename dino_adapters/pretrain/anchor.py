"""Older networks that the student is tied to: its patch similarities, and its class tokens."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_adapters.backbones.lora import merged
from dino_adapters.contracts import Features
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.gram import gram_loss, resize_tokens
from dino_adapters.pretrain.losses import exact
from dino_adapters.pretrain.objective import Learning, Teaching
from dino_adapters.recipes.teachers import GramRecipe


class GramAnchor:
    """The Gram teacher: where it comes from, when it is replaced, and the loss against it.

    Args:
        recipe: the Gram section of the phase.
        network: the Gram teacher's backbone, copied unless it is that of the start; None takes a
            copy of `average` until its first copy, or with `teacher="live"` the moving average's
            own tokens.
        average: the moving average's backbone, which copies are taken from.

    Attributes:
        network: the Gram teacher, frozen; None with `teacher="live"`.
    """

    def __init__(self, recipe: GramRecipe, network: nn.Module | None, average: nn.Module) -> None:
        self.recipe, self.average = recipe, average
        self.network: nn.Module | None = None
        if recipe.teacher == "start":
            self.network = network
        elif recipe.teacher != "live":
            source = average if network is None else network
            self.network = copy.deepcopy(merged(source)).requires_grad_(False).eval()
        self.copy_at = 0 if recipe.copy_at is None and recipe.teacher == "ema" else recipe.copy_at

    def before(self, step: int) -> None:
        """Takes over the moving average before the step that the recipe names."""
        if step == self.copy_at:
            self._copy()

    def after(self, step: int) -> None:
        """Takes over the moving average after this step, if a refresh is due."""
        if refresh_is_due(step, self.recipe):
            self._copy()

    @torch.no_grad()
    def tokens(
        self,
        crops: Crops,
        teacher: Teaching,
        grid: tuple[int, int],
        start: Features | None = None,
    ) -> Tensor:
        """The Gram teacher's patch tokens `(G * B, N, D)`, brought to the student's grid.

        They are resized before any normalisation, as in arXiv 2508.10104.

        Args:
            crops: the views.
            teacher: what the moving average makes of them.
            grid: the student's patches per column and row.
            start: what the network of the start makes of the global crops, where it was asked.
        """
        if self.network is None:
            return teacher.patches
        if self.recipe.teacher == "start" and start is not None and crops.gram_crops is None:
            return start.patches
        images = crops.global_crops if crops.gram_crops is None else crops.gram_crops
        seen = self.network(images)
        r = self.recipe
        return resize_tokens(seen.patches, seen.grid, grid, mode=r.resize, antialias=r.antialias)

    def loss(self, student: Learning, tokens: Tensor, masks: Tensor | None) -> Tensor:
        """`mean (S_student - S_teacher)²` over the similarities of the chosen patches."""
        r, mine, theirs = self.recipe, student.patches, tokens
        level = r.level
        if r.tokens != "all" and masks is not None:
            chosen = masks if r.tokens == "masked" else ~masks
            mine, theirs, level = mine[chosen], theirs[chosen], "batch"
        return gram_loss(mine, theirs, level=level, normalize=r.normalize, negatives=r.negatives)

    def _copy(self) -> None:
        if self.network is not None:
            self.network.load_state_dict(merged(self.average).state_dict())


def class_gap(student: Tensor, start: Tensor) -> Tensor:
    """Mean of `1 - cos` between class tokens of the same global crops.

    Args:
        student: `(G, B, D)`.
        start: `(G * B, D)`; receives no gradient.
    """
    own = exact(student).flatten(0, 1)
    return (1 - F.cosine_similarity(own, exact(start.detach()), dim=-1)).mean()


def first_refresh(recipe: GramRecipe) -> int:
    """After how many steps the Gram teacher is first replaced; 0 without refreshes."""
    every = recipe.refresh_every
    return 0 if every is None else -(-max(recipe.first_refresh, 1) // every) * every


def refresh_is_due(step: int, recipe: GramRecipe) -> bool:
    """Whether the Gram teacher is replaced after this step; a pure function of the step.

    The count of refreshes is that of due steps so far; the copy at `copy_at` is not one of them.
    """
    every, done = recipe.refresh_every, step + 1
    if every is None or done < recipe.first_refresh or done % every:
        return False
    before = done // every - first_refresh(recipe) // every
    return recipe.max_refreshes is None or before < recipe.max_refreshes

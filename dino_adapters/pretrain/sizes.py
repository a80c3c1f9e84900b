"""Which sizes the crops of a step have."""

from __future__ import annotations

import torch

from dino_adapters.pretrain.augment import Sizes
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import generator


def all_sizes(recipe: PretrainRecipe) -> tuple[Sizes, ...]:
    """The recipe's one set of sizes, or those of its mixture."""
    gram, crops = recipe.gram, recipe.crops
    plain = ((crops.global_size, crops.local_size, None if gram is None else gram.size),)
    choices = tuple((m.global_size, m.local_size, m.gram_size) for m in crops.mixture) or plain
    if gram is None or gram.teacher == "live":
        return tuple(Sizes(whole, local) for whole, local, _ in choices)
    # A Gram crop of the same size is made too, unless it would be the global crop itself.
    same = not gram.distort
    return tuple(
        Sizes(whole, local, own or (whole if same else None)) for whole, local, own in choices
    )


def sizes_at(step: int, recipe: PretrainRecipe) -> Sizes:
    """The sizes of a step: drawn from the mixture by seed and step, so all devices agree."""
    choices = all_sizes(recipe)
    if len(choices) == 1:
        return choices[0]
    weights = torch.tensor([m.probability for m in recipe.crops.mixture])
    drawn = torch.multinomial(weights, 1, generator=generator(recipe.seed, "sizes", step))
    return choices[int(drawn)]


def largest_side(recipe: PretrainRecipe) -> int:
    """The largest crop that is ever made, in pixels."""
    return max(max(s.global_size, s.gram_size or 0) for s in all_sizes(recipe))


def largest_global(recipe: PretrainRecipe) -> int:
    """The largest global crop, in pixels."""
    return max(sizes.global_size for sizes in all_sizes(recipe))


def snapshot_steps(recipe: PretrainRecipe) -> frozenset[int]:
    """After which steps a backbone is exported on the way, evenly spread."""
    count = recipe.checkpoint.snapshots
    return frozenset(round(recipe.steps * (i + 1) / (count + 1)) for i in range(count))

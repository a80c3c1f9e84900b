"""The regularizer that keeps class tokens apart, over a whole batch and all devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dino_adapters.pretrain.losses import exact, koleo_loss
from dino_adapters.pretrain.ranks import ALONE, Ranks
from dino_adapters.pretrain.regularizers import kde_loss, sigreg_loss
from dino_adapters.recipes.sections import ObjectiveRecipe


@dataclass(frozen=True, slots=True)
class Pull:
    """What a regularizer of the whole batch asks of one micro-batch.

    Attributes:
        value: of the whole batch.
        gradient: of the value with respect to this micro-batch's class tokens `(G, b, D)`, over
            its share of the batch, as losses of micro-batches are weighted by theirs.
    """

    value: Tensor
    gradient: Tensor

    def on(self, cls: Tensor) -> Tensor:
        """A scalar of the value, whose gradient with respect to the tokens is `gradient`."""
        through = (exact(cls) * self.gradient).sum()
        return self.value + through - through.detach()


def spread(
    objective: ObjectiveRecipe,
    cls: Tensor,
    step: int,
    *,
    ranks: Ranks = ALONE,
    kin: Tensor | None = None,
) -> Tensor:
    """The regularizer that keeps class tokens apart: mean over global crops, each by itself.

    All look at class tokens before the head, SIGReg too. Others put it on the head's bottleneck,
    whose values start near 0 in small heads, where its gradient vanishes: in the small network of
    the tests it is a millionth of that on class tokens.

    Args:
        objective: which one, and its options.
        cls: class tokens `(G, B, D)` before the head.
        step: seeds SIGReg's directions.
        ranks: who shares the batch.
        kin: int64 `(B,)`; KoLeo lets images of the same number alone.
    """
    each, group = [], objective.koleo_group
    for tokens in cls:
        if objective.regularizer == "kde":
            each.append(kde_loss(tokens, ranks=ranks))
        elif objective.regularizer == "sigreg":
            each.append(sigreg_loss(tokens, step=step, ranks=ranks))
        else:
            each.append(
                koleo_loss(
                    tokens,
                    neighbours=objective.koleo_neighbours,
                    group=group,
                    # Groups that lie inside a rank ask nothing of the others.
                    ranks=ALONE if group and len(tokens) % group == 0 else ranks,
                    kin=kin,
                )
            )
    return torch.stack(each).mean()


def looks_beyond(objective: ObjectiveRecipe, images: int) -> bool:
    """Whether the regularizer couples images of different micro-batches of this many."""
    o = objective
    if o.regularizer == "none" or not o.regularizer_weight:
        return False
    return not (o.regularizer == "koleo" and o.koleo_group and images % o.koleo_group == 0)

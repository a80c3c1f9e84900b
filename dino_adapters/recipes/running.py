"""Sections about the run itself: what is watched, refused and delivered, and on which devices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dino_adapters.recipes.sections import Fraction, Section


class MonitorRecipe(Section):
    """Looks at the teacher while it trains: is it working?"""

    every: Fraction = 0.1
    """Share of the run between two looks; there is one before the first step and one after the
    last. 0 turns them off."""
    images: int = Field(default=128, ge=2)
    """Images of the run, evenly spread, that label-free signs are read from."""
    source: str | None = None
    """Labelled images for k-NN and linear probe; None is `data.source`."""
    labels: str | None = None
    """Their labels, as in `data.labels`; None is that."""
    labelled: int = Field(default=1000, ge=8)
    """At most so many labelled images are read in a look, as many of each class as can be."""
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """When features collapse, or fall behind those before the first step by 5 points and by more
    than chance (by 20 with too few images for an interval): say so; stop; or go back to the best
    look with half the learning rate, at most `rollbacks` times, and stop then."""
    rollbacks: int = Field(default=2, ge=0)
    """How often a run may go back."""
    patience: int = Field(default=0, ge=0)
    """Ends after so many looks in a row without a new best, k-NN and linear probe averaged; 0
    never."""
    tensorboard: bool = False
    """Write what is noted for TensorBoard, too, into the folder `tensorboard` of the run."""


class GateRecipe(Section):
    """The run ends by comparing what it made with what it started from.

    With labels, k-NN and linear probe of both are compared on images that nothing was chosen on,
    and the start is exported unless the result is shown to be better, or `unshown` says otherwise.
    Both stay in the run's folder.
    """

    unshown: Literal["start", "continued"] = "start"
    """What is exported where no difference is shown, or nothing is labelled."""


class GuardRecipe(Section):
    """What happens to steps whose loss or gradient is not finite."""

    most_skipped: int = Field(default=3, ge=0)
    """Skip so many of them, nothing being applied; the next one stops the run."""
    save: bool = True
    """Keep the first such batch with the training state, for `pretrain --replay`."""


class ParallelRecipe(Section):
    """How the work of a step is divided, in time and over devices."""

    micro_batch: int | None = Field(default=None, ge=1)
    """Images that one device takes through the networks at once; None is all of its share. The
    result is that of the whole batch, as targets, masks and KoLeo see all of it."""
    sharding: Literal["none", "full"] = "none"
    """On several devices: every one holds the whole state (DDP), or a part of it (FSDP2)."""

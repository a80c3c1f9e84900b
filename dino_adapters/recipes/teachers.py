"""Sections about the networks that a student learns from: Gram anchoring, distillation."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dino_adapters.recipes.sections import Fraction, Section, StudentName


class GramRecipe(Section):
    """Gram anchoring: similarities between patches are tied to those of an older network."""

    teacher: str = "ema"
    """`ema` (a copy of the moving average), `live` (the moving average itself), `start` (the
    network that the run or phase starts from), the name of an earlier phase, its snapshot
    `PHASE@STEP`, or weights that `load_backbone` opens."""
    copy_at: int | None = Field(default=None, ge=0)
    """Step of this phase before which the moving average is copied; None is 0 for `ema`, and never
    for others. With `ema` the term begins, and its ramp, at that step."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Replace the Gram teacher by the moving average every so many steps; None never."""
    first_refresh: int = Field(default=0, ge=0)
    """No replacement before so many steps are done."""
    max_refreshes: int | None = Field(default=None, ge=0)
    """At most so many replacements."""
    weight: float = Field(default=2.0, ge=0.0)
    """Weight of the mean of squared differences."""
    ramp: Fraction = 0.0
    """Half a cosine from 0 to the weight, as a share of the phase."""
    size: int | None = Field(default=None, ge=8)
    """Side of the Gram teacher's crops in pixels; None is that of the global crops. DINOv3 takes
    1.5 to 2 times that."""
    distort: bool = False
    """Colour and blur the Gram teacher's crops like the student's."""
    level: Literal["image", "batch"] = "image"
    """Similarities within each crop, or between all patches of the batch."""
    normalize: bool = True
    """Cosine similarities."""
    negatives: Literal["keep", "clip", "clip_teacher", "clip_shared"] = "keep"
    """Negative similarities: kept, set to 0 in both, in the teacher alone (what the reference
    does), or in the teacher and where both are negative (what it documents)."""
    tokens: Literal["all", "masked", "unmasked"] = "all"
    """Which patches, by the student's masks; a choice compares at batch level."""
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """How the teacher's finer grid is brought to the student's."""
    antialias: bool = False
    """Smooth while doing so."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.refresh_every is None and (self.first_refresh or self.max_refreshes is not None):
            raise ValueError(
                "first_refresh or max_refreshes is given without refresh_every. Say how often "
                "the Gram teacher is replaced, or leave them out"
            )
        if self.teacher == "start" and (self.refresh_every or self.copy_at is not None):
            raise ValueError(
                "refresh_every or copy_at is given, and with teacher=start the Gram teacher stays "
                "what the run began with. Leave it out, or set teacher=ema"
            )
        own = {"size", "distort", "copy_at", "refresh_every"}
        given = sorted(name for name in own if getattr(self, name) not in (None, False))
        if self.teacher == "live" and given:
            raise ValueError(
                f"{given[0]} is given, and with teacher=live the moving average's own tokens are "
                "used. Leave it out, or set teacher=ema"
            )
        return self


class StudentRecipe(Section):
    """One student of a distillation."""

    source: str
    """A catalogue name (random start), or anything that `load_backbone` opens (its weights)."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """Changes to the named architecture; only with a catalogue name."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth."""


class DistillRecipe(Section):
    """Smaller students learn from a frozen teacher; one forward pass of it serves all of them."""

    teacher: str | None = None
    """An earlier phase, `PHASE/STUDENT` where it made several, or anything that `load_backbone`
    opens; None is the phase before."""
    by: Literal["auto", "heads", "features"] = "auto"
    """What is imitated: the teacher's assignments to its prototypes, which needs its heads (our
    exports hold them), or its features. auto: heads where there are any."""
    students: dict[StudentName, StudentRecipe] = Field(min_length=1)
    """By name; each gets an export of its own."""

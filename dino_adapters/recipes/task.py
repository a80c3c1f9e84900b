"""TaskRecipe: a frozen backbone, labels, and how their worth is measured."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dino_adapters.recipes.data import DataRecipe


class TaskRecipe(BaseModel):
    """One labelled task; `fit` and `evaluate` read it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    data: DataRecipe
    """The images and their labels."""
    split: str = "auto"
    """A split file (JSON or CSV), or `auto`: drawn from the seed, by groups and classes."""
    backbone: str = "vitmicro8"
    """Anything that `load_backbone` opens: an export folder, a weights file, a name."""
    size: int | tuple[int, ...] | None = None
    """Side in pixels of the square that the network sees; of several, the best on validation is
    taken; None is the size it was trained at."""
    fit: Literal["crop", "squash"] = "crop"
    """How an image becomes that square: centre crop, or both sides scaled."""
    features: Literal["cls", "mean", "cls_mean"] = "cls"
    """The vector of an image: class token, mean of the patch tokens, or both."""
    head: str = "linear"
    """knn, ncm, linear, or a head of your own."""
    head_options: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the head, e.g. `head_options.k=20`."""
    shots: tuple[int, ...] = (1, 3, 5)
    """Images per class for few-shot results; empty to leave them out."""
    draws: int = Field(default=10, ge=1)
    """Random draws of those images; the interval is over them."""
    seed: int = Field(default=0, ge=0)
    """Same seed, same split and draws."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = self.size if isinstance(self.size, tuple) else (self.size,)
        if not sizes or any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"size is {self.size}. Give pixels, several of them, or none")
        if any(count < 1 for count in self.shots) or len(set(self.shots)) != len(self.shots):
            raise ValueError(f"shots is {self.shots}. Give different numbers from 1 on")
        return self

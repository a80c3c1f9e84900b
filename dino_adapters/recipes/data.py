"""DataRecipe: where images are and how their numbers are read. Shared by all recipes."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field, model_validator


class DataRecipe(
    BaseModel,
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    allow_inf_nan=False,
):
    """A set of images."""

    source: str
    """A folder (searched below), a glob pattern, or a CSV with a column `path`."""
    labels: str | None = None
    """A CSV with the columns `path` and `label` (and `group`), or `folder`: the folder's name."""
    metadata: str | None = None
    """A CSV with the column `path` and those that `guides` name; cells may be empty."""
    bands: tuple[str, ...] | None = None
    """Names of the files' channels in their order; needed for anything but grey or RGB."""
    value_range: tuple[float, float] | None = None
    """File values that mean 0 and 1; needed for 16-bit and float images."""
    image_size: int | None = Field(default=None, ge=8)
    """Training reads images with the shorter side at this many pixels; None derives it."""
    workers: int = Field(default=2, ge=0)
    """Threads that read and decode; results do not depend on it."""
    max_unreadable: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of unreadable files above which the run is refused."""
    memory_gb: float = Field(default=2.0, ge=0.0)
    """Decoded images are kept in memory up to this size."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ValueError(
                f"value_range is {self.value_range}. Give the file value that means 0 (black) "
                "first and a larger one that means 1 second"
            )
        if self.bands is not None and len(set(self.bands)) != len(self.bands):
            raise ValueError(f"bands {self.bands} hold a name twice. Name every channel once")
        return self

"""Images as they are in files: pixels, the bands they stand for, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import numpy as np

Units = Literal[
    "srgb",
    "reflectance",
    "radiance",
    "backscatter_db",
    "hounsfield",
    "relative",
    "digital_number",
]
"""What the numbers in a file mean. `srgb` is display-referred; `relative` has no physical unit."""

UNITS: tuple[str, ...] = get_args(Units)


@dataclass(frozen=True, slots=True)
class Band:
    """One channel: its name, and the physical range that the model sees as 0 to 1.

    `low` and `high` are in the numbers of the file (after its own scale and offset, if any), so an
    8-bit photograph has `low=0, high=255`.
    """

    name: str
    units: Units = "srgb"
    wavelength_nm: float | None = None
    low: float = 0.0
    high: float = 255.0


RGB: tuple[Band, ...] = tuple(
    Band(name, "srgb", wavelength)
    for name, wavelength in (("red", 665.0), ("green", 560.0), ("blue", 490.0))
)
"""Bands of an ordinary photograph; wavelengths in nm are those of Sentinel-2's visible bands."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies: a map's CRS or a patient frame, the affine to it, and the time."""

    frame: str
    affine: tuple[float, ...]
    time: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, unchanged from its file.

    Attributes:
        key: Name that is the same on every machine (for files: path below the data folder).
        pixels: `(C, H, W)` or `(C, Z, H, W)` in the file's dtype; C = len(bands).
        bands: What each channel is.
        valid: bool `(H, W)` or `(Z, H, W)`, False = no data; None means all valid.
        spacing: `(row, column)` or `(z, row, column)` in the unit of `place`; None for photos.
        place: Where it lies; None for photos.
        group: Patient, ground tile or site that no split may divide; None = the key itself.
        label: Class name, or None.
    """

    key: str
    pixels: np.ndarray
    bands: tuple[Band, ...]
    valid: np.ndarray | None = field(default=None, repr=False)
    spacing: tuple[float, ...] | None = None
    place: Place | None = None
    group: str | None = None
    label: str | None = None

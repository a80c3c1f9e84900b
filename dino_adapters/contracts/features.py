"""What every backbone returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Everything that decides the numbers of a vector. Equal specs: interchangeable vectors.

    Attributes:
        backbone_digest: Digest of weights, architecture and normalisation (`BackboneInfo.digest`).
        bands: Names of the bands read, in order.
        size: Side in pixels of the square that the network saw.
        fit: How an image became that square: `crop` or `squash`.
        dtype: dtype the vectors are stored in, e.g. `float32`.
        layers: Earlier blocks stored beside the last one.
        norm: Whether the final norm was applied.
    """

    backbone_digest: str
    bands: tuple[str, ...]
    size: int
    fit: str = "crop"
    dtype: str = "float32"
    layers: tuple[int, ...] = ()
    norm: bool = True


@dataclass(frozen=True, slots=True)
class Features:
    """Tokens of a batch of images.

    Attributes:
        cls: `(B, D)` class token; for networks without one, the pooled map.
        registers: `(B, R, D)`; R = 0 for networks without registers.
        patches: `(B, N, D)`, N = h * w, row-major.
        grid: `(h, w)`.
        layers: `(cls, patches)` of each earlier block that was asked for, in block order.
        keys: Sample keys, where known; length B.
        spec: How the numbers were made, where known.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    keys: tuple[str, ...] = ()
    spec: FeatureSpec | None = None

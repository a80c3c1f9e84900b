"""Promises between rooms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dino_adapters.contracts.sample import RGB, Band

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from dino_adapters.contracts.features import Features
    from dino_adapters.contracts.sample import Sample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """What a user of a backbone must know; written into every card.

    Attributes:
        name: Catalogue or timm name, or the name given at export.
        family: `vit`, `convnext` (both ours) or `timm` (any other network).
        embed_dim: D, width of every token.
        patch_size: Pixels per side of one patch token.
        depth: Number of blocks (ViT) or stages (ConvNeXt and other networks).
        registers: R.
        bands: Bands the network reads, in order, with the range it maps to 0..1.
        mean: Per band, subtracted after that mapping.
        std: Per band, divided by.
        size: Side in pixels that the network was last trained at.
        architecture: Keyword arguments that rebuild the network, JSON-safe.
        licence: Licence of the weights, `none` for random ones.
        digest: Hex digest of weights, architecture, bands and normalisation.
        training: Summary of how the weights came to be, JSON-safe.
        untrained_bands: Names of bands whose filters were spread from others and never trained.
    """

    name: str
    family: str
    embed_dim: int
    patch_size: int
    depth: int
    registers: int
    bands: tuple[Band, ...] = RGB
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: int = 224
    architecture: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "none"
    digest: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    untrained_bands: tuple[str, ...] = ()


@runtime_checkable
class Network(Protocol):
    """A trainable network (an `nn.Module`) that turns images into `Features`.

    Pretraining, freezing and export see networks through these names alone, whether ours or timm's.
    """

    embed_dim: int
    patch_size: int
    num_registers: int
    depth: int
    supports_masks: bool
    """Whether `forward_crops` can hide patches; without it a student trains without iBOT."""

    def __call__(
        self, images: Tensor, *, layers: Sequence[int] = (), norm: bool = True
    ) -> Features:
        """Features of normalised images `(B, C, H, W)`; see `Backbone`."""
        ...

    def forward_crops(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> list[Features]:
        """Features of several groups of crops in one pass.

        Args:
            crops: One `(B_i, C, H_i, W_i)` per group: global crops first, then local crops.
            masks: Per group bool `(B_i, N_i)`, True = hidden from the network, or None.
        """
        ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen network in eval mode."""

    @property
    def info(self) -> BackboneInfo:
        """What the network is and expects."""
        ...

    def __call__(
        self, images: Tensor, *, layers: Sequence[int] = (), norm: bool = True
    ) -> Features:
        """Features of a batch.

        Args:
            images: `(B, C, H, W)` float, normalised (`data.units.to_model` makes them); H and W
                are multiples of `info.patch_size`.
            layers: Blocks whose tokens are wanted too (0 is the first, -1 the last).
            norm: Apply the final LayerNorm to every layer returned, the last included.

        Raises:
            ShapeError: C, H or W do not fit; the message names the nearest size.
        """
        ...


class Reader(Protocol):
    """Reads one kind of file."""

    suffixes: tuple[str, ...]

    def read(self, path: Path, key: str) -> Sample:
        """The image, unchanged.

        Raises:
            UnreadableFileError: the file is damaged or of another kind.
        """
        ...


class SampleSource(Protocol):
    """A data set: keys in a fixed order, and the sample behind each."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, sorted."""
        ...

    def read(self, key: str) -> Sample:
        """One sample; raises UnreadableFileError."""
        ...

    def digest(self, key: str) -> str:
        """Hex digest of the file's content."""
        ...

    def __len__(self) -> int:
        """Number of keys."""
        ...

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        ...

"""A source and a backbone that count what is asked of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_adapters.contracts import (
    RGB,
    BackboneInfo,
    Band,
    Features,
    Sample,
    UnreadableFileError,
)


class FakeSource:
    def __init__(self, images: dict[str, np.ndarray], bands: tuple[Band, ...] = RGB) -> None:
        self.images, self.bands = dict(images), bands
        self.broken: set[str] = set()
        self.valid: dict[str, np.ndarray] = {}
        self.reads = 0

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(self.images))

    def read(self, key: str) -> Sample:
        self.reads += 1
        if key in self.broken:
            raise UnreadableFileError(f"{key} is truncated.")
        pixels = self.images[key]
        bands = self.bands if len(pixels) == len(self.bands) else (Band("grey"),) * len(pixels)
        return Sample(key, pixels, bands, valid=self.valid.get(key))

    def digest(self, key: str) -> str:
        return hashlib.blake2b(self.images[key].tobytes(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)


class FakeBackbone:
    def __init__(self, digest: str = "weights-1") -> None:
        self._info = BackboneInfo(
            "fake", "vit", embed_dim=6, patch_size=8, depth=1, registers=1, size=16, digest=digest
        )
        self.images_seen = 0
        self.stop_after: int | None = None

    @property
    def info(self) -> BackboneInfo:
        return self._info

    def with_info(self, **changes) -> "FakeBackbone":
        self._info = replace(self._info, **changes)
        return self

    def __call__(
        self, images: Tensor, *, layers: Sequence[int] = (), norm: bool = True
    ) -> Features:
        if self.stop_after is not None and self.images_seen >= self.stop_after:
            raise KeyboardInterrupt
        self.images_seen += len(images)
        blocks = F.unfold(images, 8, stride=8).reshape(len(images), images.shape[1], 64, -1)
        patches = torch.cat([blocks.mean(2), blocks.amax(2)], dim=1).mT
        grid = (images.shape[2] // 8, images.shape[3] // 8)
        # CLS differs from the mean patch, and registers would be seen if they were pooled.
        cls = patches.amax(1) + 1.0
        return Features(cls, torch.full((len(images), 1, 6), 1e6), patches, grid)


@pytest.fixture
def backbone() -> FakeBackbone:
    return FakeBackbone()


@pytest.fixture
def make_backbone():
    return FakeBackbone


@pytest.fixture
def source() -> FakeSource:
    rng = np.random.default_rng(0)
    return FakeSource(
        {f"im{i:02d}.png": rng.integers(0, 256, (3, 20, 24), dtype=np.uint8) for i in range(23)}
    )


@pytest.fixture
def make_source():
    return FakeSource

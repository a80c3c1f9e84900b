from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_adapters.contracts import BackboneInfo, Band


@pytest.fixture
def chance() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def rgb_info() -> BackboneInfo:
    return BackboneInfo("tiny", "vit", 8, 8, 1, 0)


@pytest.fixture
def band_info() -> Callable[..., BackboneInfo]:
    def make(names: list[str], low: float = 0.0, high: float = 10000.0) -> BackboneInfo:
        bands = tuple(Band(name, "reflectance", None, low, high) for name in names)
        count = len(names)
        return BackboneInfo(
            "tiny", "vit", 8, 8, 1, 0, bands=bands, mean=(0.5,) * count, std=(0.25,) * count
        )

    return make


@pytest.fixture
def save_tiff() -> Callable[..., Path]:
    rasterio = pytest.importorskip("rasterio")

    def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
        profile = {
            "driver": "GTiff",
            "count": pixels.shape[0],
            "height": pixels.shape[1],
            "width": pixels.shape[2],
            "dtype": pixels.dtype,
        }
        descriptions = options.pop("descriptions", None)
        scales, offsets = options.pop("scales", None), options.pop("offsets", None)
        mask = options.pop("mask", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, "w", **{**profile, **options}) as opened:
                opened.write(pixels)
                for number, text in enumerate(descriptions or (), start=1):
                    opened.set_band_description(number, text)
                if scales is not None:
                    opened.scales = scales
                if offsets is not None:
                    opened.offsets = offsets
                if mask is not None:
                    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
                        opened.write_mask(mask)
        return path

    return save


@pytest.fixture
def photos(tmp_path: Path, chance: np.random.Generator) -> Path:
    """Three classes of four RGB pictures, in class folders."""
    for label in ("cat", "dog", "owl"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            pixels = chance.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{label}{number}.png")
    return tmp_path / "photos"

"""Vectors without a network: what every backbone must beat before its numbers mean anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dino_adapters.contracts import DataError, SampleSource, ShapeError
from dino_adapters.data.resize import to_square
from dino_adapters.data.units import to_range, valid_pixels

PERCENTILES = (5, 25, 50, 75, 95)
BINS = 8


def raw_pixels(source: SampleSource, keys: Sequence[str], *, side: int = 16) -> np.ndarray:
    """The image itself, shrunk: float32 `(n, C * side * side)` in 0..1.

    The middle square of each image, antialiased. No data counts as 0. Grey images among colour
    ones get the colour ones' bands.

    Raises:
        UnreadableFileError: a file is damaged; take keys that a store holds.
        DataError: images differ in their bands.
        ShapeError: the side is smaller than 1.
    """
    if side < 1:
        raise ShapeError(f"side is {side}. Choose 1 or more; 16 to 32 is usual.")
    rows = []
    for key in keys:
        image, valid = _read(source, key)
        tensor = torch.from_numpy(np.ascontiguousarray(image * valid))
        rows.append(to_square(tensor, side, "crop").clamp(0.0, 1.0).numpy())
    return _stack(rows, keys)


def image_statistics(source: SampleSource, keys: Sequence[str]) -> np.ndarray:
    """Statistics of colour and texture: float32 `(n, 7 * C + 22)`, 43 numbers for RGB.

    Per band mean, standard deviation and five percentiles; of the mean over bands an 8-bin
    histogram; of its gradients at two scales the orientation histogram in 4 bins (weighted by
    magnitude), and the mean, the standard deviation and the 95th percentile of the magnitude.
    Pixels without data are left out. The numbers differ in scale: use `scaling="zscore"` in
    `LinearProbe`.

    Raises:
        UnreadableFileError: a file is damaged; take keys that a store holds.
        DataError: images differ in their bands.
    """
    rows = []
    for key in keys:
        image, valid = _read(source, key)
        colour = np.stack([_moments(band[valid]) for band in image])
        grey = image.mean(axis=0)
        histogram = _shares(np.histogram(grey[valid], bins=BINS, range=(0.0, 1.0))[0])
        texture = np.concatenate([_gradients(grey, valid, step) for step in (1, 4)])
        common = np.concatenate([histogram, texture])
        # One row per band, so that grey images can be widened like pixels are.
        rows.append((colour, common))
    colours = _stack([colour for colour, _ in rows], keys)
    commons = np.array([common for _, common in rows], dtype=np.float32).reshape(len(rows), -1)
    return np.concatenate([colours, commons], axis=1)


def _read(source: SampleSource, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(C, H, W)` float32 in 0..1 and valid pixels `(H, W)`."""
    sample = source.read(key)
    image, valid = to_range(sample), valid_pixels(sample)
    if valid is None or not valid.any():
        return image, np.ones(image.shape[1:], dtype=bool)
    return np.where(valid, image, np.float32(0.0)), valid


def _stack(rows: list[np.ndarray], keys: Sequence[str]) -> np.ndarray:
    """Arrays `(C, ...)` to `(n, C * ...)`; single-band ones are repeated to the others' C."""
    bands = {len(row) for row in rows}
    widest = max(bands, default=0)
    if len(bands - {1}) > 1:
        example = next(
            key for key, row in zip(keys, rows, strict=True) if len(row) not in (1, widest)
        )
        raise DataError(
            f"Images have {sorted(bands)} bands, so their numbers cannot be compared (first odd "
            f"one: '{example}'). Give the source images of one kind."
        )
    wide = [np.repeat(row, widest, axis=0) if len(row) < widest else row for row in rows]
    return np.array([row.ravel() for row in wide], dtype=np.float32)


def _moments(values: np.ndarray) -> np.ndarray:
    return np.array([values.mean(), values.std(), *np.percentile(values, PERCENTILES)])


def _gradients(grey: np.ndarray, valid: np.ndarray, step: int) -> np.ndarray:
    """Orientation shares `(4,)`, mean, spread and 95th percentile of the magnitude, at a scale."""
    height, width = (max(side // step, 1) * step for side in grey.shape)
    if min(grey.shape) < 3 * step:
        return np.zeros(7)  # too small for this scale: no gradient, which is what it shows
    blocks = grey[:height, :width].reshape(height // step, step, width // step, step)
    whole = valid[:height, :width].reshape(height // step, step, width // step, step)
    coarse, known = blocks.mean(axis=(1, 3)), np.asarray(whole.all(axis=(1, 3)))
    down = coarse[2:, 1:-1] - coarse[:-2, 1:-1]
    right = coarse[1:-1, 2:] - coarse[1:-1, :-2]
    # A difference across the edge of valid data is no texture.
    inside = known[2:, 1:-1] & known[:-2, 1:-1] & known[1:-1, 2:] & known[1:-1, :-2]
    if not inside.any():
        return np.zeros(7)
    down, right = down[inside], right[inside]
    magnitude = np.hypot(down, right)
    angle = np.mod(np.arctan2(down, right), np.pi)
    # Bins are centred on 0, 45, 90 and 135 degrees: straight edges do not fall on a boundary.
    bins = np.round(angle / (np.pi / 4)).astype(int) % 4
    orientation = _shares(np.bincount(bins, weights=magnitude, minlength=4))
    return np.concatenate(
        [orientation, [magnitude.mean(), magnitude.std(), np.percentile(magnitude, 95)]]
    )


def _shares(counts: np.ndarray) -> np.ndarray:
    total = counts.sum()
    return counts / total if total > 0 else np.zeros(len(counts))

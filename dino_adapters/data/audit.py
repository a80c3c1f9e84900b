"""What is in a data set, before anything is spent on it: numpy and Pillow only, one pass.

Near duplicates: every image becomes a grey picture of 9 x 8 cells, whose 64 signs of horizontal
gradients are its hash; pairs whose hashes differ in at most `HAMMING` bits are kept if their
16 x 16 thumbnails, too, differ by less than `CONTRAST` on average (in standard deviations).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from dino_adapters.contracts import DataError, Sample, UnitsError, UnreadableFileError
from dino_adapters.data.advice import suggest, value_ranges
from dino_adapters.data.source import ImageSource
from dino_adapters.data.units import observed_range, valid_pixels
from dino_adapters.runtime.console import progress

HAMMING = 3
CONTRAST = 0.35
MOST_COMPARED = 30_000
METHOD = (
    f"64-bit gradient hash, at most {HAMMING} bits apart, and 16 x 16 thumbnails less than "
    f"{CONTRAST} standard deviations apart"
)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found; JSON-safe through `as_json`.

    Attributes:
        source: Name of the data folder, without the path to it.
        count: Images, readable or not.
        unreadable: Key and reason of each that could not be read.
        sizes: `width x height` and how often, most frequent first, at most ten.
        smallest_side: Shortest side of any image in pixels, 0 if none could be read.
        median_side: Median of the shorter sides.
        dtypes: dtype and number of images.
        bands: Names of bands, joined by commas, and number of images.
        ranges: Per dtype: least and greatest valid value.
        invalid_share: Share of invalid pixels over all images.
        classes: Class and number of images, most frequent first; empty without labels.
        unlabelled: Images without a class, where others have one.
        groups: Number of groups that were named.
        exact: Sets of keys whose files are equal byte for byte, at most `max_pairs` sets.
        exact_count: Number of such sets.
        near: Pairs of keys that look alike and are not equal, at most `max_pairs`.
        near_count: Number of such pairs.
        near_method: How they were found.
        suggestions: Settings and warnings, as sentences.
        notices: What was ignored or converted.
    """

    source: str
    count: int
    unreadable: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[str, int], ...]
    smallest_side: int
    median_side: float
    dtypes: Mapping[str, int]
    bands: Mapping[str, int]
    ranges: Mapping[str, tuple[float, float]]
    invalid_share: float
    classes: Mapping[str, int]
    unlabelled: int
    groups: int
    exact: tuple[tuple[str, ...], ...]
    exact_count: int
    near: tuple[tuple[str, str], ...]
    near_count: int
    near_method: str
    suggestions: tuple[str, ...]
    notices: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and texts."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Look:
    """What one image leaves behind."""

    key: str
    trouble: str = ""
    digest: str = ""
    width: int = 0
    height: int = 0
    dtype: str = ""
    bands: tuple[str, ...] = ()
    ranged: bool = True
    low: float = 0.0
    high: float = 0.0
    seen: bool = False
    invalid: int = 0
    thumbnail: np.ndarray | None = None
    gradient: int = 0


def inspect(
    source: ImageSource, *, workers: int = 4, max_pairs: int = 20, quiet: bool = True
) -> Inspection:
    """Reads every image once and reports what is there.

    Args:
        source: The images; unreadable ones are named, not fatal.
        workers: Threads that read; the result does not depend on it.
        max_pairs: Longest list of duplicates; the counts stay whole.
        quiet: Shows no progress.

    Raises:
        DataError: not one image could be read.
    """
    looks = []
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        progress("Reading images", len(source), quiet=quiet) as shown,
    ):
        for look in pool.map(lambda key: _look(source, key), source.keys):
            looks.append(look)
            shown.step()
    good = [look for look in looks if not look.trouble]
    if not good:
        raise DataError(
            f"None of the {len(looks)} images in {source.root} could be used. The first: "
            f"{looks[0].trouble}"
        )
    exact = _exact(good)
    near = _near(good)
    sides = np.array([min(look.width, look.height) for look in good])
    sizes = Counter(f"{look.width} x {look.height}" for look in good)
    named = Counter(source.labels[key] for key in source.keys if key in source.labels)
    classes = dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))
    pixels = sum(look.width * look.height for look in good)
    suggestions = suggest(source, looks, classes, exact=len(exact), near=len(near))
    if len(good) > MOST_COMPARED:
        suggestions.append(
            f"Near duplicates were sought among the first {MOST_COMPARED:,} images only."
        )
    return Inspection(
        source=source.root.resolve().name,
        count=len(looks),
        unreadable=tuple((look.key, look.trouble) for look in looks if look.trouble),
        sizes=tuple(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:10]),
        smallest_side=int(sides.min()),
        median_side=float(np.median(sides)),
        dtypes=_counted(look.dtype for look in good),
        bands=_counted(", ".join(look.bands) for look in good),
        ranges=value_ranges(good),
        invalid_share=sum(look.invalid for look in good) / pixels,
        classes=classes,
        unlabelled=sum(key not in source.labels for key in source.keys) if classes else 0,
        groups=len(set(source.groups.values())),
        exact=tuple(exact[:max_pairs]),
        exact_count=len(exact),
        near=tuple(near[:max_pairs]),
        near_count=len(near),
        near_method=METHOD,
        suggestions=tuple(suggestions),
        notices=source.notices.summary(),
    )


def _look(source: ImageSource, key: str) -> Look:
    try:
        sample = source.read(key)
    except (UnreadableFileError, UnitsError) as error:
        return Look(key, trouble=str(error))
    height, width = sample.pixels.shape[-2:]
    valid = valid_pixels(sample)
    seen = observed_range(sample)
    low, high = seen or (0.0, 0.0)
    grey = _grey(sample, valid)
    cells = _shrink(grey, 9, 8)
    bits = (cells[:, 1:] > cells[:, :-1]).ravel()
    return Look(
        key,
        digest=source.digest(key),
        width=width,
        height=height,
        dtype=sample.pixels.dtype.name,
        bands=tuple(band.name for band in sample.bands),
        ranged=all(np.isfinite((band.low, band.high)).all() for band in sample.bands),
        low=low,
        high=high,
        seen=seen is not None,
        invalid=0 if valid is None else int(np.count_nonzero(~valid)),
        thumbnail=_shrink(grey, 16, 16).astype(np.float16),
        gradient=int.from_bytes(np.packbits(bits).tobytes(), "big"),
    )


def _grey(sample: Sample, valid: np.ndarray | None) -> np.ndarray:
    """float32 `(H, W)`: mean over bands, with mean 0 and deviation 1 over valid pixels."""
    grey = sample.pixels.mean(axis=0, dtype=np.float32)
    inside = grey if valid is None else grey[valid]
    if not inside.size:
        return np.zeros_like(grey)
    spread = float(inside.std())
    grey = (grey - float(inside.mean())) / (spread if spread > 0 else 1.0)
    if valid is not None:
        grey[~valid] = 0.0
    return grey


def _shrink(grey: np.ndarray, width: int, height: int) -> np.ndarray:
    small = Image.fromarray(grey).resize((width, height), Image.Resampling.BOX)
    return np.asarray(small)


def _exact(looks: Sequence[Look]) -> list[tuple[str, ...]]:
    same: dict[str, list[str]] = defaultdict(list)
    for look in looks:
        same[look.digest].append(look.key)
    return [tuple(keys) for keys in same.values() if len(keys) > 1]


def _near(looks: Sequence[Look]) -> list[tuple[str, str]]:
    """Pairs by key order. Compares all with all, in blocks, up to a number that takes seconds."""
    # Equal files are listed elsewhere: one of each stands for all.
    chosen = list({look.digest: look for look in reversed(looks)}.values())[::-1][:MOST_COMPARED]
    hashes = np.array([look.gradient for look in chosen], dtype=np.uint64)
    pairs = []
    for start in range(0, len(chosen), 512):
        block = hashes[start : start + 512, None] ^ hashes[None, start:]
        for row, column in np.argwhere(np.bitwise_count(block) <= HAMMING):
            first, second = start + int(row), start + int(column)
            if first >= second:
                continue
            one, other = chosen[first].thumbnail, chosen[second].thumbnail
            if one is None or other is None or not (one.any() and other.any()):
                continue  # plain images look alike without being duplicates
            if float(np.abs(one.astype(np.float32) - other).mean()) < CONTRAST:
                pairs.append((chosen[first].key, chosen[second].key))
    return pairs


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))

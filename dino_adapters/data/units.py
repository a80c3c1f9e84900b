"""Digital numbers to what a network sees: bands matched by name, ranges explicit, nothing guessed.

A file's numbers mean nothing without two facts: which band each channel is, and which values mean
0 and 1. 8-bit files bring the second one along (0 to 255). For everything else the user says it,
or the image is refused: a wrong scale is the commonest silent failure with satellite images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dino_adapters.contracts import RGB, Band, UnitsError, UnreadableFileError
from dino_adapters.runtime.lookup import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dino_adapters.contracts import BackboneInfo, Sample
    from dino_adapters.runtime.console import Notices

CLIPPED = "values outside value_range clipped"
TINY = "values fill under 1 % of value_range; is its unit right?"
EMPTY = "images with pixels that are NaN or infinite, which count as empty"
REPLICATED = "grey images shown to an RGB network three times over"
OTHER_RANGE = "value_range differs from the one the network was trained with"

_USUAL_WHOLE = (
    (0, 255, "for 8-bit"),
    (0, 4095, "for 12-bit"),
    (0, 10000, "for reflectance x 10000"),
    (0, 65535, "for full 16-bit"),
)
_USUAL_REAL = ((0, 1, "for shares of 1"),)
_GREY = ("grey", "gray")
_RGB_NAMES = tuple(band.name for band in RGB)
_WAVELENGTHS = {band.name: band.wavelength_nm for band in RGB}


def name_bands(
    names: Sequence[str | Band],
    dtype: np.dtype,
    value_range: tuple[float, float] | None = None,
    *,
    bits: int = 8,
) -> tuple[Band, ...]:
    """Bands with their ranges, as far as they are known.

    Args:
        names: A name per channel, or a whole `Band`, which keeps its own range.
        dtype: dtype of the pixels. uint8 means 0 to 255; any other dtype has no range of its own.
        value_range: File values that mean 0 and 1, for all channels given by name.
        bits: Bits in use of a uint8 file (a 1-bit TIFF holds 0 and 1 only).

    Returns:
        One band per channel; an unknown range is NaN, which `to_range` refuses.
    """
    if value_range is not None:
        low, high = value_range
    elif dtype == np.uint8:
        low, high = 0.0, float(2**bits - 1)
    else:
        low = high = math.nan
    made = []
    for name in names:
        if isinstance(name, Band):
            made.append(name)
            continue
        shown = dtype == np.uint8 and name in (*_RGB_NAMES, *_GREY)
        units = "srgb" if shown else "relative" if dtype.kind == "f" else "digital_number"
        made.append(Band(name, units, _WAVELENGTHS.get(name), float(low), float(high)))
    return tuple(made)


def check_names(
    where: str, channels: int, bands: Sequence[str | Band] | None, what: str = ""
) -> None:
    """Refuses a list of band names that is not one name per channel.

    Raises:
        UnitsError: the numbers differ.
    """
    if bands is not None and len(bands) != channels:
        given = ", ".join(band if isinstance(band, str) else band.name for band in bands)
        raise UnitsError(
            f"{where} has {channels} channel{'s' if channels != 1 else ''}{what}, but "
            f"{len(bands)} names were given: {given}. Give one name per channel, in the file's "
            "order: data.bands=[...] (for commands: --bands NAME,NAME,...)."
        )


def match_bands(sample_bands: Sequence[Band], wanted_bands: Sequence[Band]) -> tuple[int, ...]:
    """Channels of the file that a network reads, in the network's order.

    Bands are matched by name, so the order in the file does not matter and further bands are left
    out. One grey channel serves a network that reads red, green and blue.

    Returns:
        An index into `sample_bands` for each wanted band.

    Raises:
        UnitsError: a wanted band is absent; the message says what is there and what to set.
    """
    there = [band.name for band in sample_bands]
    wanted = [band.name for band in wanted_bands]
    if len(there) == 1 and there[0] in _GREY:
        if sorted(wanted) == sorted(_RGB_NAMES):
            return (0,) * len(wanted)
        if len(wanted) == 1 and wanted[0] in _GREY:
            return (0,)
    missing = [name for name in wanted if name not in there]
    if missing:
        text = (
            f"The network reads the bands {', '.join(wanted)}; the image has {', '.join(there)}. "
            f"Absent: {', '.join(missing)}."
        )
        if len(there) < len(wanted):
            raise UnitsError(
                f"{text} The image has fewer channels than the network reads: use a network for "
                "the bands that are there."
            )
        example = wanted if len(wanted) == len(there) else [*wanted, "..."]
        setting = ", ".join(f'"{name}"' for name in example)
        hint = nearest(missing[0], set(there) - set(wanted))
        spelt = f" {hint}" if hint.startswith("Did") else ""
        raise UnitsError(
            f"{text}{spelt} If they are there under other names, name the {len(there)} channels "
            f"in the file's order, e.g. data.bands=[{setting}] (for commands: --bands "
            f"{','.join(example)})."
        )
    return tuple(there.index(name) for name in wanted)


def valid_pixels(sample: Sample) -> np.ndarray | None:
    """Mask `(H, W)`: the sample's own mask without NaN and infinity; None means all valid."""
    if sample.pixels.dtype.kind != "f":
        return sample.valid
    finite = np.logical_and.reduce(np.isfinite(sample.pixels), axis=0)
    if sample.valid is not None:
        return finite & sample.valid
    return None if finite.all() else finite


def to_range(sample: Sample, *, notices: Notices | None = None) -> np.ndarray:
    """Pixels in the range that models work in.

    Args:
        sample: Any dtype; every band needs a known range.
        notices: Counts clipped values; without it they are clipped all the same.

    Returns:
        float32 `(C, H, W)` in 0 to 1: (value - low) / (high - low) of each band, clipped there.
        Values that are NaN or infinite become 0.

    Raises:
        UnitsError: the range of a band is unknown; the message says what was found and what to set.
    """
    pixels = sample.pixels
    low = np.array([band.low for band in sample.bands])
    high = np.array([band.high for band in sample.bands])
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise _unknown_range(sample)
    shape = (-1, *[1] * (pixels.ndim - 1))
    whole = pixels.dtype == np.uint8 and (low <= 0).all() and (high >= 255).all()
    # float32 holds integers up to 2^24 exactly; wider numbers are scaled in float64 first.
    wide = pixels.dtype.itemsize > 2 and pixels.dtype != np.float32
    kind = np.float64 if wide else np.float32
    scaled = pixels.astype(kind) - low.astype(kind).reshape(shape)
    scaled /= (high - low).astype(kind).reshape(shape)
    if not whole:
        _note_range(sample, scaled, notices)
        if pixels.dtype.kind == "f":
            scaled[~np.isfinite(pixels)] = 0.0
        np.clip(scaled, 0.0, 1.0, out=scaled)
    return scaled.astype(np.float32, copy=False)


def to_model(sample: Sample, info: BackboneInfo, *, notices: Notices | None = None) -> Tensor:
    """An image as a network wants it: the only road from file values to network values.

    Args:
        sample: An image with named bands of known range.
        info: The network's card: its bands, mean and std.
        notices: Counts what was clipped or replicated.

    Returns:
        float32 `(C, H, W)` tensor, C = len(info.bands), normalised; invalid pixels are 0, the mean.

    Raises:
        UnitsError: a band is absent, or its range is unknown.
    """
    import torch  # here: the rest of this room, and so `inspect`, does without it

    try:
        indices = match_bands(sample.bands, info.bands)
    except UnitsError as error:
        raise UnitsError(f"{sample.key}: {error}") from None
    if notices is not None and len(set(indices)) < len(indices):
        notices.add(REPLICATED, sample.key)
    bands = tuple(sample.bands[index] for index in indices)
    chosen = replace(sample, pixels=sample.pixels[list(indices)], bands=bands)
    _compare_ranges(chosen, info, notices)
    image = to_range(chosen, notices=notices)
    shape = (-1, *[1] * (image.ndim - 1))
    image = image - np.array(info.mean, dtype=np.float32).reshape(shape)
    image /= np.array(info.std, dtype=np.float32).reshape(shape)
    valid = valid_pixels(chosen)
    if valid is not None:
        image[:, ~valid] = 0.0
    return torch.from_numpy(image)


def too_small(sample: Sample, patch_size: int) -> bool:
    """Whether a side of the image is shorter than one patch."""
    return min(sample.pixels.shape[-2:]) < patch_size


def check_size(sample: Sample, least: int) -> None:
    """Refuses an image without room for one patch; collectors skip it, count it and name it.

    Raises:
        UnreadableFileError: a side is shorter than `least` pixels.
    """
    if too_small(sample, least):
        height, width = sample.pixels.shape[-2:]
        raise UnreadableFileError(
            f"{sample.key} is {width} x {height} pixels, smaller than a patch of {least}. Use "
            "larger images or a network with smaller patches."
        )


def observed_range(sample: Sample) -> tuple[float, float] | None:
    """Least and greatest valid value over all bands; None if no pixel is valid."""
    valid = valid_pixels(sample)
    values = sample.pixels if valid is None else sample.pixels[:, valid]
    if not values.size:
        return None
    return float(values.min()), float(values.max())


def range_hint(dtype: str, low: float, high: float) -> str:
    """A sentence that offers a `value_range` for values between low and high; none is ever applied.

    The smallest usual ranges that hold them; where none does, whole numbers around them. Both
    spellings are given, that of recipes and that of commands.
    """
    (start, end, what), *others = _candidates(dtype, low, high)
    more = "".join(f", [{a:.10g},{b:.10g}] {use}" for a, b, use in others)
    return (
        f"Set the range for all images alike, e.g. data.value_range=[{start:.10g},{end:.10g}] "
        f"{what}{more} (for commands: --value-range {start:.10g},{end:.10g})."
    )


def _candidates(dtype: str, low: float, high: float) -> Sequence[tuple[float, float, str]]:
    """Ranges that hold the values, the smallest first, and what each is usual for."""
    whole = np.dtype(dtype).kind in "ui"
    usual = [
        (start, end, what)
        for start, end, what in (_USUAL_WHOLE if whole else _USUAL_REAL)
        if start <= low and high <= end
    ]
    if usual:
        return usual
    start, end = math.floor(low), math.ceil(high)
    return [(start, end if end > start else start + 1, "to hold what was seen")]


def _unknown_range(sample: Sample) -> UnitsError:
    dtype, seen = sample.pixels.dtype, observed_range(sample)
    low, high = seen or (0.0, 1.0)
    found = f"with values from {low:g} to {high:g}" if seen else "without one valid pixel"
    return UnitsError(
        f"{sample.key} holds {dtype} numbers {found}, and nothing says which of them mean 0 and 1. "
        f"{range_hint(dtype.name, low, high)}"
    )


def _note_range(sample: Sample, scaled: np.ndarray, notices: Notices | None) -> None:
    """Counts what is empty or will be clipped, and says when the image is a hundred times off."""
    if notices is None:
        return
    if sample.pixels.dtype.kind == "f" and not np.isfinite(sample.pixels).all():
        notices.add(EMPTY, sample.key)
    valid = valid_pixels(sample)
    values = scaled if valid is None else scaled[:, valid]
    # A rounding error of the division is no clipping.
    outside = int(np.count_nonzero((values < -1e-6) | (values > 1.0 + 1e-6)))
    if outside:
        notices.add(CLIPPED, sample.key, outside)
    if values.size and 0.0 < float(values.max()) < 0.01 and values.min() >= 0.0:
        notices.add(TINY, sample.key)


def _compare_ranges(sample: Sample, info: BackboneInfo, notices: Notices | None) -> None:
    """Names the network's range where the image has none; notes it where the two differ."""
    for band, wanted in zip(sample.bands, info.bands, strict=True):
        photo = (wanted.low, wanted.high) == (0.0, 255.0)
        if math.isnan(band.low) and not photo:
            raise UnitsError(
                f"{_unknown_range(sample)} The network was trained with {wanted.low:g} to "
                f"{wanted.high:g}; take data.value_range=[{wanted.low:.10g},{wanted.high:.10g}] "
                f"(for commands: --value-range {wanted.low:.10g},{wanted.high:.10g}) "
                "only if these images are in the same unit."
            )
        if not photo and (band.low, band.high) != (wanted.low, wanted.high):
            if notices is not None:
                notices.add(OTHER_RANGE, sample.key)
            return

"""TIFF and other map files: all bands, the file's dtype, nodata as validity [rasterio, optional].

TIFF always comes here and never to Pillow, which drops bands and bits. Files are opened anew for
each read: a GDAL handle must not be shared between threads or processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from dino_adapters.contracts import Band, Place, Sample, UnitsError, UnreadableFileError
from dino_adapters.data.damage import find_damage
from dino_adapters.data.units import check_names, name_bands
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.lookup import READERS, need

ORIENTATION_TAG = 0x0112
_COLOURS = ("red", "green", "blue")


@READERS.register_module(name="raster")
class RasterReader:
    """Reads one TIFF with all its bands.

    Args:
        bands: Names of the channels in the file's order; one named `alpha` becomes the mask of
            valid pixels. A file's own tag for alpha is not believed: writers put it on near
            infrared by default.
        value_range: Values that mean 0 and 1 (after scale and offset); not needed for 8 bits.
        notices: Counts conversions.
    """

    suffixes: tuple[str, ...] = (".tif", ".tiff")

    def __init__(
        self,
        *,
        bands: Sequence[str | Band] | None = None,
        value_range: tuple[float, float] | None = None,
        notices: Notices | None = None,
    ) -> None:
        self.bands, self.value_range = bands, value_range
        self.notices = Notices() if notices is None else notices

    def read(self, path: Path, key: str) -> Sample:
        """The image `(C, H, W)` in the file's dtype; float32 where it has a scale or offset.

        Raises:
            UnreadableFileError: damaged, truncated, too large or not a TIFF.
            UnitsError: the bands' names do not fit the file, or pages hide bands.
            MissingLibraryError: rasterio is absent.
        """
        rasterio = need("rasterio", extra="satellite")
        try:
            with _open(rasterio, path, "GTiff") as opened:
                _check_extent(opened, key)
                # GTIFF_DIR:13:path; the list comes sorted as text, with page 10 before page 2.
                pages = sorted(opened.subdatasets, key=lambda name: int(name.split(":")[1]))
                if len(pages) > 1:
                    return self._pages(rasterio, opened, pages, key)
                return self._sample(opened, key)
        except rasterio.errors.RasterioError as error:
            raise UnreadableFileError(_refusal(path, key, "TIFF", error)) from error

    def _pages(self, rasterio: Any, opened: Any, pages: Sequence[str], key: str) -> Sample:
        """A file of several pages: bands if the user says so, else the first page or a refusal."""
        if opened.count > 1:
            self.notices.add("TIFF files of several pages, of which the first is read", key)
            return self._sample(opened, key)
        if self.bands is None or len(self.bands) != len(pages):
            raise UnitsError(
                f"{key} holds {len(pages)} pages of one channel. If the pages are bands, name all "
                f"{len(pages)} with data.bands=[...] (for commands: --bands NAME,NAME,...); if "
                "they are images, save each to a file."
            )
        arrays, valid = [], None
        for page in pages:
            with _open(rasterio, page, None) as part:
                array, mask = _values(part, self.notices, key)
                arrays.append(array)
                valid = mask if valid is None else valid if mask is None else valid & mask
        if len({array.shape for array in arrays}) > 1:
            raise UnitsError(f"{key} holds pages of several sizes. Save one image to a file.")
        bands = name_bands(self.bands, arrays[0].dtype, self.value_range)
        return Sample(key, np.concatenate(arrays), bands, valid)

    def _sample(self, opened: Any, key: str) -> Sample:
        pixels, valid = _values(opened, self.notices, key)
        names = self.bands
        check_names(key, len(pixels), names)
        if names is None:
            names = _own_names(opened, len(pixels))
        else:
            _check_order(opened, names, key)
        plain = [name if isinstance(name, str) else name.name for name in names]
        if "alpha" in plain:
            at = plain.index("alpha")
            mask = pixels[at] > 0
            valid = mask if valid is None else valid & mask
            pixels = np.delete(pixels, at, axis=0)
            names = [name for index, name in enumerate(names) if index != at]
        # A palette's colours have 8 bits, however few its indices have.
        coloured = opened.colorinterp[0].name == "palette"
        bits = 8 if coloured else int(opened.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
        bands = name_bands(names, pixels.dtype, self.value_range, bits=bits)
        place = spacing = None
        if opened.crs is None and opened.transform.is_identity:
            turn = _orientation(Path(opened.name))
            pixels = np.ascontiguousarray(upright(pixels, turn))
            valid = None if valid is None else upright(valid, turn)
        else:
            affine = opened.transform
            frame = opened.crs.to_string() if opened.crs is not None else "unknown"
            place = Place(frame, tuple(affine)[:6])
            spacing = (float(np.hypot(affine.b, affine.e)), float(np.hypot(affine.a, affine.d)))
        return Sample(key, pixels, bands, valid, spacing, place)


def read_deep_png(path: Path, key: str) -> np.ndarray:
    """uint16 `(C, H, W)` of a PNG with 16 bits and several channels, alpha last if it has one.

    Raises:
        UnreadableFileError: damaged.
        MissingLibraryError: rasterio is absent; Pillow alone would drop 8 of the 16 bits.
    """
    rasterio = need("rasterio", extra="satellite")
    try:
        with _open(rasterio, path, "PNG") as opened:
            _check_extent(opened, key)
            return opened.read()
    except rasterio.errors.RasterioError as error:
        raise UnreadableFileError(_refusal(path, key, "16-bit PNG", error)) from error


def _refusal(path: Path, key: str, kind: str, error: Exception) -> str:
    plain = find_damage(path, str(error))
    if plain:
        return f"{key} {plain}. Remove it, or fetch it again."
    why = str(error)
    if "Read failed" in why:  # GDAL: the rest of its words are about itself
        why = "its pixels are cut off or damaged"
    return f"{key} cannot be read as {kind} ({why}). Remove it, or save it again."


def _open(rasterio: Any, path: Path | str, driver: str | None) -> Any:
    # Every open of a plain image warns that it has no map coordinates. The filter is set again
    # each time, as it is lost when a caller's own filters are restored; others stay untouched.
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio.open(path, driver=driver) if driver else rasterio.open(path)


def _check_extent(opened: Any, key: str) -> None:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)  # the limit that photographs have
    if opened.width * opened.height > limit:
        raise UnreadableFileError(
            f"{key} is {opened.width} x {opened.height} pixels, more than is read at once "
            f"({limit:,}). Cut it into tiles first."
        )


def _values(opened: Any, notices: Notices, key: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels `(C, H, W)`, upright in meaning, and the mask of valid ones (None: all)."""
    pixels = opened.read()
    if pixels.dtype.kind == "c":
        raise UnitsError(f"{key} holds complex numbers. Save their amplitude as float32 first.")
    valid = _validity(opened, pixels)
    structure = opened.tags(ns="IMAGE_STRUCTURE")
    if opened.count == 1 and opened.colorinterp[0].name == "palette" and pixels.dtype == np.uint8:
        pixels = _look_up(opened.colormap(1), pixels[0])
        if len(pixels) == 3:
            notices.add("palette images converted to RGB", key)
    elif structure.get("MINISWHITE") == "YES":
        if pixels.dtype.kind != "u":
            raise UnitsError(f"{key} stores white as 0 in {pixels.dtype}. Save it the other way.")
        notices.add("images that store white as 0, inverted", key)
        pixels = np.iinfo(pixels.dtype).max - pixels
    elif structure.get("SOURCE_COLOR_SPACE") == "CMYK":
        notices.add("CMYK images converted to RGB", key)  # by GDAL, which adds a full alpha
        pixels = pixels[:3]
    scales, offsets = np.array(opened.scales), np.array(opened.offsets)
    if len(scales) == len(pixels) and ((scales != 1).any() or (offsets != 0).any()):
        notices.add("scale and offset of the file applied", key)
        pixels = pixels * scales[:, None, None] + offsets[:, None, None]
        pixels = pixels.astype(np.float32)
    return pixels, valid


def _validity(opened: Any, pixels: np.ndarray) -> np.ndarray | None:
    """Mask `(H, W)` from the file's mask, its nodata values and NaN; None: all valid.

    A value marked as nodata in one band hides the pixel, as the marker is no measurement. In 8-bit
    files all bands must hold it: 0 and 255 are colours there, too.
    """
    valid = np.ones(pixels.shape[1:], dtype=bool)
    flags = opened.mask_flag_enums[0]
    names = {flag.name for flag in flags}
    if "per_dataset" in names and "alpha" not in names:
        valid &= opened.read_masks(1) > 0
    holes = []
    for band, nodata in zip(pixels, opened.nodatavals, strict=True):
        if nodata is None or np.isnan(nodata):
            holes.append(np.zeros(band.shape, dtype=bool))
        else:
            # A nodata value outside the dtype's range equals no pixel, which is right.
            holes.append(band == nodata)
    marked = np.stack(holes)
    valid &= ~(marked.all(axis=0) if pixels.dtype == np.uint8 else marked.any(axis=0))
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(pixels).all(axis=0)
    return None if valid.all() else valid


def _look_up(colours: dict[int, tuple[int, ...]], index: np.ndarray) -> np.ndarray:
    """Colours of a palette image: `(3, H, W)`, or `(1, H, W)` where the palette is all grey."""
    table = np.zeros((256, 3), dtype=np.uint8)
    for value, colour in colours.items():
        if 0 <= value < 256:
            table[value] = colour[:3]
    if (table == table[:, :1]).all():
        return table[index, 0][None]
    return np.ascontiguousarray(np.moveaxis(table[index], -1, 0))


def _own_names(opened: Any, channels: int) -> tuple[str, ...]:
    """Names that the file itself gives, else numbers."""
    described = [str(text).strip() for text in opened.descriptions if text]
    if len(described) == channels == len(set(described)) and "" not in described:
        return tuple(described)
    if channels == 1:
        return ("grey",)
    tagged = tuple(colour.name for colour in opened.colorinterp)
    if channels == 3 and (sorted(tagged) == sorted(_COLOURS) or len(tagged) != channels):
        return tagged if len(tagged) == channels else _COLOURS
    if channels == 3 and opened.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE") == "CMYK":
        return _COLOURS
    return tuple(f"band{number}" for number in range(1, channels + 1))


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors `(..., H, W)` as EXIF orientation 1 to 8 says; other values: unchanged."""
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, -1, -2)
    if orientation in (2, 3, 6, 7):
        array = array[..., ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    return array


def _orientation(path: Path) -> int:
    """The orientation tag of a TIFF's first page, which GDAL does not report; 1 where absent."""
    with path.open("rb") as opened:
        head = opened.read(16)
        order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"

        def number(data: bytes) -> int:
            return int.from_bytes(data, order)

        big = number(head[2:4]) == 43  # BigTIFF: 8-byte offsets and counts, entries of 20 bytes
        opened.seek(number(head[8:16] if big else head[4:8]))
        count = number(opened.read(8 if big else 2))
        size, value_at = (20, 12) if big else (12, 8)
        for _ in range(min(count, 4096)):
            entry = opened.read(size)
            if number(entry[:2]) == ORIENTATION_TAG:
                return number(entry[value_at : value_at + 2])
    return 1


def _check_order(opened: Any, names: Sequence[str | Band], key: str) -> None:
    """Refuses names that the file gives, too, but to other channels."""
    given = [name if isinstance(name, str) else name.name for name in names]
    described = [str(text).strip() for text in opened.descriptions if text]
    if sorted(described) == sorted(given) and described != given:
        raise UnitsError(
            f"{key} describes its bands as {', '.join(described)}, but the bands given "
            f"are {', '.join(given)}. Leave them out, or give the file's order."
        )

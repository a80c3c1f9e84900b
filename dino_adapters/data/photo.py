"""Photographs: JPEG, PNG, WebP, GIF and BMP, unchanged in bits and turned upright [Pillow]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dino_adapters.contracts import Band, MissingLibraryError, Sample, UnreadableFileError
from dino_adapters.data.damage import find_damage
from dino_adapters.data.raster import ORIENTATION_TAG, read_deep_png, upright
from dino_adapters.data.units import check_names, name_bands
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.lookup import READERS

# TIFF is not among them on purpose: Pillow drops bands and bits of TIFF files without a word.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_PNG = b"\x89PNG\r\n\x1a\n"


@READERS.register_module(name="photo")
class PhotoReader:
    """Reads one photograph as it is: bits kept, EXIF orientation applied once, alpha as validity.

    Args:
        bands: Names of the channels in the file's order; a fourth channel of a PNG is the mask of
            valid pixels unless it is named here as a band.
        value_range: File values that mean 0 and 1; not needed for 8 bits.
        notices: Counts conversions.
    """

    suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

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
        """The image in the file's dtype: uint8 (C, H, W), or uint16 where the file has 16 bits.

        Raises:
            UnreadableFileError: damaged, truncated, too large, or none of the known formats.
            UnitsError: `bands` does not name the channels that are there.
        """
        try:
            pixels, alpha = self._decode(path, key)
        except (UnreadableFileError, MissingLibraryError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise UnreadableFileError(
                f"{key} would unpack to more pixels than is safe ({error}). If it is a real image, "
                "cut it into tiles first."
            ) from error
        except Exception as error:
            # Decoders raise nearly anything on damaged files (OSError, SyntaxError, struct.error,
            # IndexError, ...); to a user they all mean the same.
            raise UnreadableFileError(_refusal(path, key, error)) from error
        return self._sample(pixels, alpha, key)

    def _decode(self, path: Path, key: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels `(C, H, W)` and the alpha channel `(H, W)`, if there is one."""
        with Image.open(path, formats=FORMATS) as image:
            turn = self._orientation(image, key)
            if getattr(image, "is_animated", False):
                self.notices.add("files of several frames, of which the first is read", key)
                image.seek(0)
            if _is_deep_colour(path):
                # Pillow would hand over the upper 8 of the 16 bits, as ordinary RGB.
                pixels = read_deep_png(path, key)
            else:
                pixels = self._channels(image, key)
        alpha = None
        if pixels.shape[0] in (2, 4):
            pixels, alpha = pixels[:-1], pixels[-1]
        pixels = upright(pixels, turn)
        return pixels, None if alpha is None else upright(alpha, turn)

    def _orientation(self, image: Image.Image, key: str) -> int:
        try:
            return int(image.getexif().get(ORIENTATION_TAG, 1))
        except Exception:
            # Broken EXIF is common in photographs from the web, whose pixels are fine all the same.
            self.notices.add("unreadable EXIF data, image taken as upright", key)
            return 1

    def _channels(self, image: Image.Image, key: str) -> np.ndarray:
        """`(C, H, W)` without loss; 2 or 4 channels end in alpha."""
        mode, clear = image.mode, "transparency" in image.info
        if mode == "1":
            return _array(image)[None].astype(np.uint8) * 255
        if mode.startswith("I;16"):
            array = _array(image)[None].astype(np.uint16)
            if clear:
                alpha = (array != image.info["transparency"]).astype(np.uint16)
                return np.concatenate((array, alpha * 65535))
            return array
        if mode in ("P", "PA"):
            mode = "RGBA" if clear or mode == "PA" else "RGB"
        elif clear and mode in ("L", "RGB"):
            mode = {"L": "LA", "RGB": "RGBA"}[mode]
        elif mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            self.notices.add(f"{mode} images converted to RGB", key)
            mode = "RGB"
        elif mode not in ("L", "LA", "RGB", "RGBA", "I"):
            raise UnreadableFileError(
                f"{key} is stored in Pillow's mode {mode}, which is not supported. Save it as an "
                "8- or 16-bit grey or RGB image."
            )
        array = _array(image if mode == image.mode else image.convert(mode))
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)

    def _sample(self, pixels: np.ndarray, alpha: np.ndarray | None, key: str) -> Sample:
        names: Sequence[str | Band] | None = self.bands
        if names is not None and alpha is not None and len(names) == len(pixels) + 1:
            # The user named the last channel: a band unless it is called alpha.
            last = names[-1] if isinstance(names[-1], str) else names[-1].name
            if last == "alpha":
                names = names[:-1]
            else:
                pixels, alpha = np.concatenate((pixels, alpha[None])), None
        check_names(key, len(pixels), names, " beside alpha" if alpha is not None else "")
        if names is None:
            names = ("grey",) if len(pixels) == 1 else ("red", "green", "blue")
        valid = None
        if alpha is not None and not alpha.all():
            valid = alpha > 0
        bands = name_bands(names, pixels.dtype, self.value_range)
        return Sample(key, np.ascontiguousarray(pixels), bands, valid)


def _refusal(path: Path, key: str, error: Exception) -> str:
    plain = find_damage(path, str(error))
    if plain:
        return f"{key} {plain}. Remove it, or fetch it again."
    # Pillow's own words for a format it does not know hold nothing but the path.
    unknown = isinstance(error, UnidentifiedImageError)
    why = "it begins like none of them" if unknown else error
    return (
        f"{key} cannot be decoded as JPEG, PNG, WebP, GIF or BMP ({why}). Remove it, or save it "
        "again."
    )


def _array(image: Image.Image) -> np.ndarray:
    # load() raises on a truncated file, as Pillow's LOAD_TRUNCATED_IMAGES stays False.
    image.load()
    return np.asarray(image)


def _is_deep_colour(path: Path) -> bool:
    """Whether a PNG has 16 bits and more than one channel (header bytes 24 and 25)."""
    with path.open("rb") as opened:
        head = opened.read(26)
    return head.startswith(_PNG) and len(head) == 26 and head[24] == 16 and head[25] in (2, 4, 6)

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dino_adapters.contracts import MissingLibraryError, UnitsError, UnreadableFileError
from dino_adapters.data.photo import PhotoReader
from dino_adapters.data.raster import upright
from dino_adapters.data.units import to_range
from dino_adapters.runtime.console import Notices


def png(depth: int, colour: int, rows: np.ndarray) -> bytes:
    """A PNG written by hand, as Pillow cannot write 16-bit colour; rows `(H, W, C)` big-endian."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    height, width = rows.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(raw))]
    return b"".join([*parts, chunk(b"IEND", b"")])


def read(path: Path, **options: object):
    return PhotoReader(**options).read(path, path.name)  # pyright: ignore[reportArgumentType]


class TestFormats:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
    def test_rgb_comes_back_bit_for_bit(
        self, tmp_path: Path, chance: np.random.Generator, suffix: str
    ):
        pixels = chance.integers(0, 256, (9, 13, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
        sample = read(tmp_path / f"a.{suffix}")
        assert np.array_equal(sample.pixels, pixels.transpose(2, 0, 1))
        assert [band.name for band in sample.bands] == ["red", "green", "blue"]
        assert {(band.low, band.high) for band in sample.bands} == {(0.0, 255.0)}
        assert sample.valid is None

    def test_jpeg_equals_pillow(self, tmp_path: Path, chance: np.random.Generator):
        Image.fromarray(chance.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(
            tmp_path / "a.jpg"
        )
        with Image.open(tmp_path / "a.jpg") as image:
            expected = np.asarray(image).transpose(2, 0, 1)
        assert np.array_equal(read(tmp_path / "a.jpg").pixels, expected)

    def test_grey_and_bilevel_have_one_band(self, tmp_path: Path):
        Image.fromarray(np.array([[0, 7], [200, 255]], np.uint8)).save(tmp_path / "l.png")
        Image.fromarray(np.array([[False, True]])).save(tmp_path / "1.png")
        assert read(tmp_path / "l.png").pixels.tolist() == [[[0, 7], [200, 255]]]
        assert read(tmp_path / "l.png").bands[0].name == "grey"
        assert read(tmp_path / "1.png").pixels.tolist() == [[[0, 255]]]

    def test_palette_becomes_its_colours(self, tmp_path: Path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "p.png")
        assert read(tmp_path / "p.png").pixels[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]

    def test_transparent_palette_gives_validity(self, tmp_path: Path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "p.png", transparency=1)
        sample = read(tmp_path / "p.png")
        assert sample.pixels.shape == (3, 1, 2)
        assert sample.valid is not None
        assert sample.valid.tolist() == [[True, False]]

    def test_transparent_colour_gives_validity(self, tmp_path: Path):
        Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)).save(
            tmp_path / "t.png", transparency=(9, 9, 9)
        )
        Image.fromarray(np.array([[1000, 40000]], np.uint16)).save(
            tmp_path / "d.png", transparency=40000
        )
        for name in ("t.png", "d.png"):
            valid = read(tmp_path / name).valid
            assert valid is not None
            assert valid.tolist() == [[True, False]]

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_alpha_is_validity_and_colour_is_kept(self, tmp_path: Path, mode: str):
        channels = len(mode)
        pixels = np.full((2, 2, channels), 200, np.uint8)
        pixels[0, 0, -1], pixels[0, 1, -1] = 0, 1
        Image.fromarray(pixels).save(tmp_path / "a.png")
        sample = read(tmp_path / "a.png")
        assert sample.pixels.shape == (channels - 1, 2, 2)
        assert (sample.pixels == 200).all()
        assert sample.valid is not None
        assert sample.valid.tolist() == [[False, True], [True, True]]

    def test_full_alpha_is_no_mask(self, tmp_path: Path):
        Image.new("RGBA", (3, 3), (1, 2, 3, 255)).save(tmp_path / "a.png")
        assert read(tmp_path / "a.png").valid is None

    def test_fourth_channel_is_a_band_only_by_name(self, tmp_path: Path):
        Image.new("RGBA", (3, 3), (1, 2, 3, 0)).save(tmp_path / "a.png")
        named = read(tmp_path / "a.png", bands=["red", "green", "blue", "nir"])
        assert named.pixels[:, 0, 0].tolist() == [1, 2, 3, 0]
        assert named.valid is None
        alpha = read(tmp_path / "a.png", bands=["red", "green", "blue", "alpha"])
        assert [band.name for band in alpha.bands] == ["red", "green", "blue"]
        assert alpha.valid is not None
        assert not alpha.valid.any()

    def test_wrong_number_of_names_is_refused(self, tmp_path: Path):
        Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
        with pytest.raises(
            UnitsError, match=r"a\.png has 3 channels, but 2 names were given: x, y"
        ):
            read(tmp_path / "a.png", bands=["x", "y"])

    def test_cmyk_is_converted_and_said(self, tmp_path: Path):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
        notices = Notices()
        pixels = read(tmp_path / "c.jpg", notices=notices).pixels
        assert pixels[0].min() > 200
        assert pixels[1:].max() < 50
        assert notices.counts["CMYK images converted to RGB"] == 1

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
    def test_first_frame_of_an_animation_is_said(self, tmp_path: Path, suffix: str):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        frames[0].save(
            tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True
        )
        notices = Notices()
        sample = read(tmp_path / f"a.{suffix}", notices=notices)
        assert sample.pixels[:, 0, 0].tolist() == [255, 0, 0]
        assert [what for what in notices.counts if "several frames" in what]


class TestDepth:
    def test_sixteen_bit_grey_keeps_every_value(self, tmp_path: Path):
        ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        Image.fromarray(ramp).save(tmp_path / "a.png")
        sample = read(tmp_path / "a.png", value_range=(0, 65535))
        assert sample.pixels.dtype == np.uint16
        assert np.array_equal(sample.pixels[0], ramp)
        assert len(np.unique(to_range(sample))) == 65536

    @pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
    def test_sixteen_bit_colour_keeps_every_bit(
        self, tmp_path: Path, chance: np.random.Generator, colour: int, channels: int
    ):
        pytest.importorskip("rasterio")
        pixels = chance.integers(1, 65536, (5, 7, channels), dtype=np.uint16)
        (tmp_path / "a.png").write_bytes(png(16, colour, pixels))
        sample = read(tmp_path / "a.png")
        shown = pixels if channels == 3 else pixels[..., :-1]
        assert sample.pixels.dtype == np.uint16
        assert np.array_equal(sample.pixels, shown.transpose(2, 0, 1))

    def test_sixteen_bit_colour_without_rasterio_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "a.png").write_bytes(png(16, 2, np.ones((2, 2, 3), np.uint16)))
        monkeypatch.setitem(sys.modules, "rasterio", None)
        with pytest.raises(MissingLibraryError, match=r"dino-adapters\[satellite\]"):
            read(tmp_path / "a.png")


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    def test_applied_once(self, tmp_path: Path, orientation: int, suffix: str):
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:8, :8] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(pixels).save(path, exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
        sample = read(path)
        assert np.array_equal(sample.pixels, expected)
        assert sample.pixels.flags.c_contiguous

    def test_alpha_turns_with_the_pixels(self, tmp_path: Path):
        pixels = np.full((2, 3, 4), 255, np.uint8)
        pixels[0, 0, 3] = 0
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        sample = read(tmp_path / "a.png")
        assert sample.valid is not None
        assert np.argwhere(~sample.valid).tolist() == [[0, 1]]

    @pytest.mark.parametrize("suffix", ["png", "webp"])
    def test_broken_exif_does_not_cost_the_image(self, tmp_path: Path, suffix: str):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0nonsense!")
        notices = Notices()
        assert read(tmp_path / f"a.{suffix}", notices=notices).pixels.shape == (3, 8, 8)
        assert notices.counts["unreadable EXIF data, image taken as upright"] == 1

    @settings(deadline=None, derandomize=True)
    @given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5))
    def test_upright_equals_pillow(self, orientation: int, height: int, width: int):
        array = np.arange(height * width, dtype=np.uint8).reshape(height, width)
        image = Image.fromarray(array)
        image.getexif()[0x0112] = orientation
        assert np.array_equal(
            upright(array, orientation), np.asarray(ImageOps.exif_transpose(image))
        )


class TestDamage:
    def test_truncated_files_are_refused(self, tmp_path: Path, chance: np.random.Generator):
        image = Image.fromarray(chance.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        for suffix in ("jpg", "png", "webp", "gif", "bmp"):
            held = io.BytesIO()
            image.save(held, {"jpg": "jpeg"}.get(suffix, suffix))
            (tmp_path / f"a.{suffix}").write_bytes(held.getvalue()[: len(held.getvalue()) // 2])
            with pytest.raises(UnreadableFileError, match=f"a.{suffix} is cut off"):
                read(tmp_path / f"a.{suffix}")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", r"is empty \(0 bytes\)"),
            (
                b"<!DOCTYPE html>\n<html></html>",
                r"is text, not an image \(it begins '<!DOCTYPE html",
            ),
            ("Größe ".encode() * 200, "is text, not an image"),
            ("not here".encode("utf-16"), "is text, not an image"),
            (b"\x89PNG\r\n\x1a\n", "is cut off"),
            (bytes(range(256)), r"cannot be decoded as .* \(it begins like none of them"),
        ],
    )
    def test_other_content_is_refused(self, tmp_path: Path, content: bytes, reason: str):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UnreadableFileError, match=rf"a\.jpg {reason}"):
            read(tmp_path / "a.jpg")

    def test_tiff_under_another_name_is_refused(self, tmp_path: Path):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png", "tiff")
        with pytest.raises(UnreadableFileError):
            read(tmp_path / "a.png")

    def test_decompression_bomb_is_refused(self, tmp_path: Path):
        Image.new("1", (20000, 20000)).save(tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size < 100_000
        with pytest.raises(UnreadableFileError, match="more pixels than is safe"):
            read(tmp_path / "a.png")

    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(st.binary(max_size=200), st.integers(0, 300))
    def test_noise_in_a_file_never_escapes(
        self, tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
    ):
        path = tmp_path_factory.mktemp("noise") / "a.png"
        held = io.BytesIO()
        Image.new("RGB", (16, 16), (3, 5, 7)).save(held, "png")
        whole = held.getvalue()
        path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
        with contextlib.suppress(UnreadableFileError):  # any other error would be a fault
            assert read(path).pixels.shape[0] in (1, 3)

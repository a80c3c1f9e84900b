from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_adapters.contracts import MissingLibraryError, UnitsError, UnreadableFileError
from dino_adapters.data.raster import RasterReader
from dino_adapters.data.units import to_range
from dino_adapters.runtime.console import Notices

rasterio = pytest.importorskip("rasterio")
tifffile = pytest.importorskip("tifffile")

Save = Callable[..., Path]


def read(path: Path, **options: object):
    return RasterReader(**options).read(path, path.name)  # pyright: ignore[reportArgumentType]


def names(sample) -> list[str]:
    return [band.name for band in sample.bands]


class TestPixels:
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 13])
    def test_all_bands_and_bits_come_back(
        self, tmp_path: Path, save_tiff: Save, chance: np.random.Generator, dtype: str, count: int
    ):
        pixels = (chance.random((count, 9, 7)) * 200).astype(dtype)
        sample = read(save_tiff(tmp_path / "a.tif", pixels))
        assert sample.pixels.dtype == dtype
        assert np.array_equal(sample.pixels, pixels)
        assert len(sample.bands) == count
        assert sample.valid is None
        assert all(np.isnan(band.high) for band in sample.bands) == (dtype != "uint8")

    def test_sixteen_bit_ramp_stays_whole(self, tmp_path: Path, save_tiff: Save):
        ramp = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256)
        sample = read(save_tiff(tmp_path / "a.tif", ramp), value_range=(0, 65535))
        assert len(np.unique(to_range(sample))) == 65536

    def test_planar_and_contiguous_are_the_same(self, tmp_path: Path, save_tiff: Save):
        pixels = np.arange(13 * 20, dtype=np.uint16).reshape(13, 4, 5)
        for way in ("pixel", "band"):
            assert np.array_equal(
                read(save_tiff(tmp_path / f"{way}.tif", pixels, interleave=way)).pixels, pixels
            )

    def test_threads_read_the_same(self, tmp_path: Path, save_tiff: Save):
        pixels = np.arange(4 * 64 * 64, dtype=np.uint16).reshape(4, 64, 64)
        path = save_tiff(tmp_path / "a.tif", pixels)
        reader = RasterReader()
        with ThreadPoolExecutor(4) as pool:
            for sample in pool.map(lambda _: reader.read(path, "a"), range(40)):
                assert np.array_equal(sample.pixels, pixels)

    def test_scale_and_offset_are_applied_once_and_said(self, tmp_path: Path, save_tiff: Save):
        pixels = np.array([[[1000, 2000]]], np.uint16)
        path = save_tiff(tmp_path / "a.tif", pixels, scales=(0.0001,), offsets=(-0.1,))
        notices = Notices()
        sample = read(path, notices=notices)
        assert sample.pixels.dtype == np.float32
        np.testing.assert_allclose(sample.pixels[0, 0], [0.0, 0.1], atol=1e-7)
        assert notices.counts["scale and offset of the file applied"] == 1

    def test_one_bit_palette_is_black_and_white(self, tmp_path: Path):
        Image.fromarray(np.array([[False, True]])).save(tmp_path / "a.tif")
        sample = read(tmp_path / "a.tif")
        assert to_range(sample).tolist() == [[[0.0, 1.0]]]

    def test_few_bits_use_their_own_range(self, tmp_path: Path, save_tiff: Save):
        path = save_tiff(tmp_path / "a.tif", np.array([[[0, 15]]], np.uint8), nbits=4)
        assert to_range(read(path)).tolist() == [[[0.0, 1.0]]]

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_white_is_zero_is_inverted(self, tmp_path: Path, dtype: str):
        top = np.iinfo(dtype).max
        array = np.array([[0, top // 3, top]], dtype)
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
        assert read(tmp_path / "a.tif").pixels[0].tolist() == (top - array).tolist()

    def test_palette_is_looked_up(self, tmp_path: Path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.tif")
        sample = read(tmp_path / "a.tif")
        assert sample.pixels[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]
        assert names(sample) == ["red", "green", "blue"]

    def test_cmyk_becomes_rgb_without_its_false_alpha(self, tmp_path: Path):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
        notices = Notices()
        sample = read(tmp_path / "a.tif", notices=notices)
        assert names(sample) == ["red", "green", "blue"]
        assert sample.pixels[:, 0, 0].tolist() == [255, 0, 0]
        assert notices.counts["CMYK images converted to RGB"] == 1

    @pytest.mark.parametrize("bigtiff", [False, True])
    @pytest.mark.parametrize("byteorder", ["<", ">"])
    def test_orientation_tag_is_applied(self, tmp_path: Path, bigtiff: bool, byteorder: str):
        array = np.arange(6, dtype=np.uint8).reshape(2, 3)
        tifffile.imwrite(
            tmp_path / "a.tif",
            array,
            bigtiff=bigtiff,
            byteorder=byteorder,
            photometric="minisblack",
            extratags=[(274, 3, 1, 6, True)],
        )
        assert read(tmp_path / "a.tif").pixels[0].tolist() == np.rot90(array, -1).tolist()

    def test_complex_numbers_are_refused(self, tmp_path: Path, save_tiff: Save):
        path = save_tiff(tmp_path / "a.tif", np.ones((1, 4, 4), np.complex64))
        with pytest.raises(UnitsError, match="complex numbers"):
            read(path)


class TestNames:
    def test_rgb_by_its_tag_grey_by_its_count_else_numbers(self, tmp_path: Path, save_tiff: Save):
        def of(count: int, dtype: str = "uint8", **options: object) -> list[str]:
            pixels = np.zeros((count, 4, 4), dtype)
            return names(read(save_tiff(tmp_path / "a.tif", pixels, **options)))

        assert of(1) == ["grey"]
        assert of(3) == ["red", "green", "blue"]
        assert of(3, photometric="MINISBLACK") == ["band1", "band2", "band3"]
        assert of(3, "uint16") == ["band1", "band2", "band3"]
        assert of(3, "uint16", photometric="RGB") == ["red", "green", "blue"]
        assert of(4) == ["band1", "band2", "band3", "band4"]
        assert of(4, photometric="RGB") == ["band1", "band2", "band3", "band4"]

    def test_complete_descriptions_name_the_bands(self, tmp_path: Path, save_tiff: Save):
        pixels = np.zeros((3, 4, 4), np.uint16)
        path = save_tiff(tmp_path / "a.tif", pixels, descriptions=("B04", "B03", "B8A"))
        assert names(read(path)) == ["B04", "B03", "B8A"]
        path = save_tiff(tmp_path / "b.tif", pixels, descriptions=("B04", "B03"))
        assert names(read(path)) == ["band1", "band2", "band3"]

    def test_names_in_another_order_than_the_file_says_are_refused(
        self, tmp_path: Path, save_tiff: Save
    ):
        path = save_tiff(
            tmp_path / "a.tif", np.zeros((2, 4, 4), np.uint16), descriptions=("B8A", "B11")
        )
        assert names(read(path, bands=["B8A", "B11"])) == ["B8A", "B11"]
        assert names(read(path, bands=["nir", "swir"])) == ["nir", "swir"]
        with pytest.raises(UnitsError, match="describes its bands as B8A, B11"):
            read(path, bands=["B11", "B8A"])

    def test_alpha_tag_is_believed_only_when_the_user_says_so(
        self, tmp_path: Path, save_tiff: Save
    ):
        pixels = np.full((4, 2, 2), 9, np.uint8)
        pixels[3, 0, 0] = 0
        path = save_tiff(tmp_path / "a.tif", pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as opened:
                assert opened.colorinterp[3].name == "alpha"  # the trap: nobody asked for it
        bands = ["red", "green", "blue", "nir"]
        near = read(path, bands=bands)
        assert names(near) == bands
        assert near.valid is None
        assert np.array_equal(near.pixels, pixels)
        masked = read(path, bands=[*bands[:3], "alpha"])
        assert names(masked) == bands[:3]
        assert masked.valid is not None
        assert masked.valid.tolist() == [[False, True], [True, True]]

    def test_pages_are_refused_or_bands_by_name(self, tmp_path: Path):
        pages = np.arange(13 * 20, dtype=np.uint16).reshape(13, 4, 5)
        tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
        with pytest.raises(UnitsError, match="13 pages of one channel"):
            read(tmp_path / "a.tif")
        bands = [f"B{number:02d}" for number in range(13)]
        sample = read(tmp_path / "a.tif", bands=bands)
        assert names(sample) == bands
        assert np.array_equal(sample.pixels, pages)

    def test_first_page_of_colour_images_is_said(self, tmp_path: Path):
        pages = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
        tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb")
        notices = Notices()
        sample = read(tmp_path / "a.tif", notices=notices)
        assert np.array_equal(sample.pixels, pages[0].transpose(2, 0, 1))
        assert [what for what in notices.counts if "several pages" in what]


class TestValidity:
    def test_nodata_in_one_band_hides_the_pixel(self, tmp_path: Path, save_tiff: Save):
        pixels = np.full((2, 1, 3), 500, np.int16)
        pixels[0, 0, 0] = pixels[1, 0, 1] = -9999
        sample = read(save_tiff(tmp_path / "a.tif", pixels, nodata=-9999))
        assert sample.valid is not None
        assert sample.valid.tolist() == [[False, False, True]]

    def test_eight_bit_nodata_needs_all_bands(self, tmp_path: Path, save_tiff: Save):
        pixels = np.array([[[0, 0, 5]], [[0, 9, 5]], [[0, 9, 5]]], np.uint8)
        sample = read(save_tiff(tmp_path / "a.tif", pixels, nodata=0))
        assert sample.valid is not None
        assert sample.valid.tolist() == [[False, True, True]]

    @pytest.mark.parametrize("nodata", [None, float("nan"), -9999.0])
    def test_nan_is_invalid_whatever_the_tag(
        self, tmp_path: Path, save_tiff: Save, nodata: float | None
    ):
        pixels = np.array([[[0.5, np.nan, np.inf]]], np.float32)
        options = {} if nodata is None else {"nodata": nodata}
        sample = read(save_tiff(tmp_path / "a.tif", pixels, **options))
        assert sample.valid is not None
        assert sample.valid.tolist() == [[True, False, False]]

    def test_internal_mask_counts(self, tmp_path: Path, save_tiff: Save):
        mask = np.array([[True, False], [True, True]])
        sample = read(save_tiff(tmp_path / "a.tif", np.ones((3, 2, 2), np.uint8), mask=mask))
        assert sample.valid is not None
        assert np.array_equal(sample.valid, mask)

    def test_zeros_without_a_tag_are_valid(self, tmp_path: Path, save_tiff: Save):
        assert read(save_tiff(tmp_path / "a.tif", np.zeros((1, 3, 3), np.uint16))).valid is None


class TestPlace:
    def test_georeference_is_kept(self, tmp_path: Path, save_tiff: Save):
        transform = rasterio.Affine(10, 0, 500000, 0, -20, 4000000)
        path = save_tiff(
            tmp_path / "a.tif", np.zeros((1, 4, 4), np.uint8), crs="EPSG:32633", transform=transform
        )
        sample = read(path)
        assert sample.place is not None
        assert sample.place.frame == "EPSG:32633"
        assert sample.place.affine == (10.0, 0.0, 500000.0, 0.0, -20.0, 4000000.0)
        assert sample.spacing == (20.0, 10.0)

    def test_plain_files_have_no_place(self, tmp_path: Path, save_tiff: Save):
        sample = read(save_tiff(tmp_path / "a.tif", np.zeros((1, 4, 4), np.uint8)))
        assert sample.place is None
        assert sample.spacing is None


class TestRefusals:
    def test_truncated_and_foreign_files(self, tmp_path: Path, save_tiff: Save):
        path = save_tiff(tmp_path / "a.tif", np.ones((3, 64, 64), np.uint16))
        path.write_bytes(path.read_bytes()[:4000])
        (tmp_path / "b.tif").write_bytes(b"")
        Image.new("RGB", (4, 4)).save(tmp_path / "c.tif", "png")
        (tmp_path / "d.tif").write_bytes(b"<html>")
        for name, reason in (
            ("a.tif", "cannot be read as TIFF (its pixels are cut off or damaged)"),
            ("b.tif", "is empty"),
            ("c.tif", "cannot be read as TIFF"),
            ("d.tif", "is text, not an image (it begins '<html>')"),
        ):
            with pytest.raises(UnreadableFileError, match=re.escape(f"{name} {reason}")):
                read(tmp_path / name)

    def test_huge_files_are_refused_before_they_are_read(self, tmp_path: Path, save_tiff: Save):
        with rasterio.open(
            tmp_path / "a.tif",
            "w",
            driver="GTiff",
            count=1,
            height=20000,
            width=20000,
            dtype="uint8",
            sparse_ok=True,
            transform=rasterio.Affine(1, 0, 5, 0, -1, 5),
        ):
            pass
        with pytest.raises(UnreadableFileError, match="20000 x 20000 pixels"):
            read(tmp_path / "a.tif")

    def test_without_rasterio_the_extra_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(sys.modules, "rasterio", None)
        with pytest.raises(MissingLibraryError, match=r"dino-adapters\[satellite\]"):
            read(tmp_path / "a.tif")

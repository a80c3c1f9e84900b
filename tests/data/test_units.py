from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_adapters.contracts import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RGB,
    BackboneInfo,
    Band,
    Sample,
    UnitsError,
    UnreadableFileError,
)
from dino_adapters.data import units
from dino_adapters.data.source import open_source
from dino_adapters.data.units import (
    check_size,
    match_bands,
    name_bands,
    to_model,
    to_range,
    too_small,
    valid_pixels,
)
from dino_adapters.runtime.console import Notices

MakeInfo = Callable[..., BackboneInfo]
Save = Callable[..., Path]
THIRTEEN = [f"B{number:02d}" for number in range(1, 13)] + ["B8A"]


def sample_of(pixels: np.ndarray, names: list[str], **options: object) -> Sample:
    bands = name_bands(names, pixels.dtype, options.pop("value_range", None))  # pyright: ignore
    return Sample("a.tif", pixels, bands, **options)  # pyright: ignore


def by_hand(image: np.ndarray, low: float, high: float, mean, std) -> np.ndarray:
    """Slow and obvious: one value at a time, in Python floats."""
    out = np.zeros(image.shape, np.float32)
    for index in np.ndindex(image.shape):
        value = (float(image[index]) - low) / (high - low)
        out[index] = (min(max(value, 0.0), 1.0) - mean[index[0]]) / std[index[0]]
    return out


class TestToRange:
    def test_eight_bits_need_no_setting(self):
        pixels = np.array([[[0, 51, 255]]], np.uint8)
        assert to_range(sample_of(pixels, ["grey"])).tolist() == [[[0.0, pytest.approx(0.2), 1.0]]]

    @pytest.mark.parametrize(
        ("pixels", "found", "example"),
        [
            (np.array([[[3, 4000]]], np.uint16), ("uint16", "3 to 4000"), "0,4095"),
            (np.array([[[0, 255]]], np.uint16), ("uint16", "0 to 255"), "0,255"),
            (np.array([[[5, 4096]]], np.int32), ("int32", "5 to 4096"), "0,10000"),
            (np.array([[[5, 10001]]], np.uint16), ("uint16", "5 to 10001"), "0,65535"),
            (np.array([[[5, 65536]]], np.uint32), ("uint32", "5 to 65536"), "5,65536"),
            (np.array([[[-7, 9]]], np.int16), ("int16", "-7 to 9"), "-7,9"),
            (np.array([[[0.1, 0.9]]], np.float32), ("float32", "0.1 to 0.9"), "0,1"),
            (np.array([[[0.5, 7.2]]], np.float64), ("float64", "0.5 to 7.2"), "0,8"),
        ],
    )
    def test_everything_else_is_refused_with_an_example(
        self, pixels: np.ndarray, found: tuple[str, str], example: str
    ):
        with pytest.raises(UnitsError) as caught:
            to_range(sample_of(pixels, ["grey"]))
        assert f"{found[0]} numbers with values from {found[1]}" in str(caught.value)
        assert f"data.value_range=[{example}]" in str(caught.value)
        assert f"--value-range {example})" in str(caught.value)

    def test_each_band_has_its_own_range(self):
        bands = (Band("a", "relative", None, 0.0, 10.0), Band("b", "relative", None, -1.0, 1.0))
        pixels = np.array([[[5.0]], [[0.5]]], np.float32)
        assert to_range(Sample("k", pixels, bands)).ravel().tolist() == [0.5, 0.75]

    def test_images_with_nan_are_counted(self):
        notices = Notices()
        for key, value in (("a.tif", np.nan), ("b.tif", np.inf), ("c.tif", 0.5)):
            pixels = np.array([[[value, 0.5]]], np.float32)
            made = to_range(
                replace(sample_of(pixels, ["grey"], value_range=(0, 1)), key=key), notices=notices
            )
            assert np.isfinite(made).all()
        assert notices.counts == {units.EMPTY: 2}

    def test_clipping_is_counted_over_valid_pixels_only(self):
        pixels = np.array([[[-5, 0, 5000, 20000, 30000]]], np.int32)
        valid = np.array([[True, True, True, True, False]])
        notices = Notices()
        sample = sample_of(pixels, ["grey"], value_range=(0, 10000), valid=valid)
        assert to_range(sample, notices=notices).tolist() == [[[0.0, 0.0, 0.5, 1.0, 1.0]]]
        assert notices.counts[units.CLIPPED] == 2
        assert notices.examples[units.CLIPPED] == ["a.tif"]

    def test_values_at_the_ends_are_not_clipped(self):
        notices = Notices()
        pixels = np.array([[[-0.1, 0.3]]], np.float32)
        to_range(sample_of(pixels, ["grey"], value_range=(-0.1, 0.3)), notices=notices)
        assert not notices.counts

    def test_a_hundredfold_unit_is_noticed(self):
        notices = Notices()
        pixels = np.array([[[0.02, 0.4]]], np.float32)  # reflectance under a range for DN
        to_range(sample_of(pixels, ["grey"], value_range=(0, 10000)), notices=notices)
        assert notices.counts[units.TINY] == 1

    def test_wide_integers_keep_their_precision(self):
        low = 2**30
        pixels = np.array([[[low, low + 1, low + 4]]], np.int64)
        scaled = to_range(sample_of(pixels, ["grey"], value_range=(low, low + 4)))
        assert scaled.ravel().tolist() == [0.0, 0.25, 1.0]

    @settings(deadline=None, derandomize=True)
    @given(
        st.lists(st.integers(0, 65535), min_size=1, max_size=20),
        st.integers(0, 30000),
        st.integers(1, 60000),
    )
    def test_stays_in_range_and_keeps_order(self, values: list[int], low: int, width: int):
        pixels = np.array(sorted(values), np.uint16)[None, None]
        scaled = to_range(sample_of(pixels, ["grey"], value_range=(low, low + width))).ravel()
        assert scaled.dtype == np.float32
        assert scaled.min() >= 0.0
        assert scaled.max() <= 1.0
        assert (np.diff(scaled) >= 0).all()

    def test_sixteen_bit_values_stay_distinct(self):
        ramp = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256)
        scaled = to_range(sample_of(ramp, ["grey"], value_range=(0, 65535)))
        assert len(np.unique(scaled)) == 65536


class TestMatchBands:
    def test_by_name_in_any_order(self):
        there = name_bands(["nir", "blue", "green", "red"], np.dtype("uint8"))
        assert match_bands(there, RGB) == (3, 2, 1)

    def test_grey_serves_rgb_and_grey_only(self, band_info: MakeInfo):
        grey = name_bands(["grey"], np.dtype("uint8"))
        assert match_bands(grey, RGB) == (0, 0, 0)
        assert match_bands(grey, name_bands(["gray"], np.dtype("uint8"))) == (0,)
        with pytest.raises(UnitsError, match=r"Absent: red, nir\. The image has fewer channels"):
            match_bands(grey, band_info(["red", "nir"]).bands)

    def test_absent_names_are_listed_with_a_setting(self):
        there = name_bands(["band1", "band2", "band3"], np.dtype("uint8"))
        with pytest.raises(UnitsError) as caught:
            match_bands(there, RGB)
        text = str(caught.value)
        assert "reads the bands red, green, blue; the image has band1, band2, band3" in text
        assert 'data.bands=["red", "green", "blue"]' in text

    def test_a_slip_of_spelling_is_named(self):
        there = name_bands(["red", "gren", "blue"], np.dtype("uint8"))
        with pytest.raises(UnitsError, match="Did you mean 'gren'"):
            match_bands(there, RGB)

    @settings(deadline=None, derandomize=True)
    @given(st.permutations(THIRTEEN))
    def test_a_permuted_file_gives_the_same_tensor(self, order: list[str]):
        wanted = tuple(Band(name, "reflectance", None, 0.0, 100.0) for name in THIRTEEN)
        pixels = np.arange(13, dtype=np.uint16)[:, None, None] * np.ones((1, 2, 2), np.uint16)
        info = BackboneInfo("n", "vit", 8, 8, 1, 0, bands=wanted, mean=(0.5,) * 13, std=(0.2,) * 13)
        plain = sample_of(pixels, THIRTEEN, value_range=(0, 100))
        turned = sample_of(
            pixels[[THIRTEEN.index(name) for name in order]], order, value_range=(0, 100)
        )
        assert torch.equal(to_model(plain, info), to_model(turned, info))


class TestToModel:
    def test_equals_the_slow_reference(self, rgb_info: BackboneInfo, chance: np.random.Generator):
        pixels = chance.integers(0, 256, (3, 5, 4), dtype=np.uint8)
        made = to_model(sample_of(pixels, ["red", "green", "blue"]), rgb_info)
        assert made.dtype == torch.float32
        expected = by_hand(pixels, 0, 255, IMAGENET_MEAN, IMAGENET_STD)
        np.testing.assert_allclose(made.numpy(), expected, atol=1e-6)

    def test_invalid_pixels_are_the_mean(self, rgb_info: BackboneInfo):
        valid = np.array([[True, False]])
        pixels = np.full((3, 1, 2), 255, np.uint8)
        made = to_model(sample_of(pixels, ["red", "green", "blue"], valid=valid), rgb_info)
        assert (made[:, 0, 1] == 0).all()
        assert (made[:, 0, 0] > 1).all()

    def test_nan_is_the_mean_without_any_mask(self, band_info: MakeInfo):
        pixels = np.array([[[np.nan, 1.0]], [[0.0, np.inf]]], np.float32)
        sample = sample_of(pixels, ["a", "b"], value_range=(0, 1))
        assert to_model(sample, band_info(["a", "b"], high=1.0)).abs().sum() == 0

    def test_nan_in_a_band_that_is_not_read_hides_nothing(self, band_info: MakeInfo):
        pixels = np.array([[[1.0]], [[np.nan]]], np.float32)
        sample = sample_of(pixels, ["a", "b"], value_range=(0, 1))
        assert to_model(sample, band_info(["a"], high=1.0)).item() == 2.0

    def test_grey_is_replicated_and_said(self, rgb_info: BackboneInfo):
        notices = Notices()
        sample = sample_of(np.full((1, 2, 2), 255, np.uint8), ["grey"])
        made = to_model(sample, rgb_info, notices=notices)
        assert made.shape == (3, 2, 2)
        assert notices.counts[units.REPLICATED] == 1

    def test_the_networks_range_is_offered_not_taken(self, band_info: MakeInfo):
        sample = sample_of(np.ones((2, 2, 2), np.uint16), ["a", "b"])
        with pytest.raises(UnitsError, match=r"trained with 0 to 10000.*\[0,10000\]"):
            to_model(sample, band_info(["a", "b"]))

    def test_another_range_than_the_networks_is_noticed(self, band_info: MakeInfo):
        notices = Notices()
        sample = sample_of(np.ones((1, 2, 2), np.uint16), ["a"], value_range=(0, 5))
        to_model(sample, band_info(["a"]), notices=notices)
        assert notices.counts[units.OTHER_RANGE] == 1

    def test_the_sample_is_left_alone(self, rgb_info: BackboneInfo):
        pixels = np.full((3, 2, 2), 9, np.uint8)
        sample = sample_of(pixels, ["red", "green", "blue"], valid=np.zeros((2, 2), bool))
        to_model(sample, rgb_info)
        assert (sample.pixels == 9).all()


class TestFromFileToNetwork:
    """Every kind of file: the right tensor or a refusal, never something in between."""

    def tensor(self, path: Path, info: BackboneInfo, **options: object) -> torch.Tensor:
        source = open_source(path.parent, **options)  # pyright: ignore
        return to_model(source.read(path.name), info)

    def expect(self, made: torch.Tensor, pixels: np.ndarray, info: BackboneInfo, high: float):
        expected = by_hand(pixels, 0, high, info.mean, info.std)
        np.testing.assert_allclose(made.numpy(), expected, atol=1e-5)

    def test_rgb_photograph(self, tmp_path: Path, rgb_info: BackboneInfo, chance):
        pixels = chance.integers(0, 256, (3, 4, 5), dtype=np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "a.png")
        self.expect(self.tensor(tmp_path / "a.png", rgb_info), pixels, rgb_info, 255)

    def test_grey_photograph(self, tmp_path: Path, rgb_info: BackboneInfo, band_info, chance):
        pixels = chance.integers(0, 256, (1, 4, 5), dtype=np.uint8)
        Image.fromarray(pixels[0]).save(tmp_path / "a.png")
        made = self.tensor(tmp_path / "a.png", rgb_info)
        self.expect(made, pixels.repeat(3, axis=0), rgb_info, 255)
        for names in (["red", "green", "blue", "nir"], THIRTEEN):
            with pytest.raises(UnitsError, match="the image has grey"):
                self.tensor(tmp_path / "a.png", band_info(names))

    def test_two_channels(self, tmp_path: Path, rgb_info: BackboneInfo, band_info, save_tiff: Save):
        pixels = np.array([[[0, 90]], [[200, 255]]], np.uint8)
        path = save_tiff(tmp_path / "a.tif", pixels)
        with pytest.raises(UnitsError, match="the image has band1, band2"):
            self.tensor(path, rgb_info)
        info = band_info(["vv", "vh"], high=255.0)
        self.expect(self.tensor(path, info, bands=["vv", "vh"]), pixels, info, 255)

    def test_four_channels(
        self, tmp_path: Path, rgb_info: BackboneInfo, band_info, save_tiff: Save, chance
    ):
        pixels = chance.integers(0, 256, (4, 4, 5), dtype=np.uint8)
        path = save_tiff(tmp_path / "a.tif", pixels)
        names = ["red", "green", "blue", "nir"]
        info = band_info(names, high=255.0)
        for network in (rgb_info, info):
            with pytest.raises(UnitsError, match="band1, band2, band3, band4"):
                self.tensor(path, network)
        self.expect(self.tensor(path, info, bands=names), pixels, info, 255)
        self.expect(self.tensor(path, rgb_info, bands=names), pixels[:3], rgb_info, 255)
        turned = ["nir", "red", "green", "blue"]
        made = self.tensor(path, rgb_info, bands=turned)
        self.expect(made, pixels[1:], rgb_info, 255)

    def test_thirteen_channels_of_sixteen_bits(
        self, tmp_path: Path, rgb_info: BackboneInfo, band_info, save_tiff: Save, chance
    ):
        pixels = chance.integers(0, 10001, (13, 4, 5), dtype=np.uint16)
        path = save_tiff(tmp_path / "a.tif", pixels)
        info = band_info(THIRTEEN)
        with pytest.raises(UnitsError, match="band13"):
            self.tensor(path, rgb_info)
        with pytest.raises(UnitsError, match="value_range"):
            self.tensor(path, info, bands=THIRTEEN)
        made = self.tensor(path, info, bands=THIRTEEN, value_range=(0, 10000))
        self.expect(made, pixels, info, 10000)
        wide = ["x1", "blue", "green", "red", *THIRTEEN[4:]]
        made = self.tensor(path, rgb_info, bands=wide, value_range=(0, 10000))
        self.expect(made, pixels[[3, 2, 1]], rgb_info, 10000)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_sixteen_bit_grey(
        self, tmp_path: Path, rgb_info: BackboneInfo, save_tiff: Save, chance, suffix: str
    ):
        pixels = chance.integers(0, 65536, (1, 4, 5), dtype=np.uint16)
        path = tmp_path / f"a.{suffix}"
        if suffix == "png":
            Image.fromarray(pixels[0]).save(path)
        else:
            save_tiff(path, pixels)
        with pytest.raises(UnitsError, match=r"uint16 .*data\.value_range=\[0,65535\]"):
            self.tensor(path, rgb_info)
        made = self.tensor(path, rgb_info, value_range=(0, 65535))
        self.expect(made, pixels.repeat(3, axis=0), rgb_info, 65535)

    def test_floats(self, tmp_path: Path, rgb_info: BackboneInfo, save_tiff: Save, chance):
        pixels = chance.random((3, 4, 5), dtype=np.float32)
        path = save_tiff(tmp_path / "a.tif", pixels)
        names = ["red", "green", "blue"]
        with pytest.raises(UnitsError, match=r"float32 .*data\.value_range=\[0,1\]"):
            self.tensor(path, rgb_info, bands=names)
        made = self.tensor(path, rgb_info, bands=names, value_range=(0, 1))
        self.expect(made, pixels, rgb_info, 1)

    def test_whole_bands_carry_their_own_ranges(self, tmp_path: Path, band_info, save_tiff: Save):
        bands = [
            Band("a", "backscatter_db", None, -25.0, 0.0),
            Band("b", "relative", None, 0.0, 2.0),
        ]
        path = save_tiff(tmp_path / "a.tif", np.array([[[-12.5]], [[1.0]]], np.float32))
        made = self.tensor(path, band_info(["a", "b"]), bands=bands)
        assert made.ravel().tolist() == [0.0, 0.0]


class TestSmallThings:
    def test_too_small_images_are_named_with_their_size(self):
        sample = sample_of(np.zeros((3, 7, 5), np.uint8), ["red", "green", "blue"])
        assert too_small(sample, 8)
        assert not too_small(sample, 5)
        check_size(sample, 5)
        with pytest.raises(UnreadableFileError, match="5 x 7 pixels, smaller than a patch of 8"):
            check_size(sample, 8)

    def test_validity_merges_mask_and_nan(self):
        pixels = np.array([[[1.0, np.nan, 3.0]]], np.float32)
        sample = sample_of(pixels, ["grey"], value_range=(0, 1))
        valid = valid_pixels(replace(sample, valid=np.array([[False, True, True]])))
        assert valid is not None
        assert valid.tolist() == [[False, False, True]]
        assert valid_pixels(replace(sample, pixels=np.ones((1, 1, 3), np.float32))) is None

    def test_unknown_ranges_are_nan(self):
        band = name_bands(["red"], np.dtype("uint16"))[0]
        assert math.isnan(band.low)
        assert name_bands(["red"], np.dtype("uint8"))[0] == RGB[0]

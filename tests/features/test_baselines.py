import numpy as np
import pytest

from dino_adapters.contracts import DataError, ShapeError
from dino_adapters.features.baselines import image_statistics, raw_pixels


def stripes(axis: int, size: int = 32) -> np.ndarray:
    ramp = (np.arange(size) // 4 % 2 * 200).astype(np.uint8)
    image = np.broadcast_to(ramp[:, None] if axis == 0 else ramp[None], (size, size))
    return np.stack([image] * 3)


class TestRawPixels:
    def test_a_flat_image_gives_its_value(self, make_source):
        source = make_source({"a": np.full((3, 40, 50), 51, np.uint8)})
        found = raw_pixels(source, ["a"], side=4)
        assert found.shape == (1, 48)
        np.testing.assert_allclose(found, 0.2, atol=1e-6)

    def test_an_image_of_that_size_is_itself(self, make_source):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
        found = raw_pixels(make_source({"a": pixels}), ["a"], side=8)
        np.testing.assert_allclose(found[0], pixels.ravel() / 255.0, rtol=1e-6)

    def test_grey_images_are_widened(self, make_source):
        images = {"a": np.full((3, 9, 9), 255, np.uint8), "b": np.full((1, 9, 9), 51, np.uint8)}
        found = raw_pixels(make_source(images), ["b", "a"], side=2)
        np.testing.assert_allclose(found, [[0.2] * 12, [1.0] * 12], atol=1e-6)

    def test_other_mixes_are_refused(self, make_source):
        images = {"a": np.zeros((3, 9, 9), np.uint8), "b": np.zeros((2, 9, 9), np.uint8)}
        with pytest.raises(DataError, match=r"\[2, 3\] bands.*'b'"):
            raw_pixels(make_source(images), ["a", "b"])

    def test_a_side_of_none_is_refused(self, source):
        with pytest.raises(ShapeError, match="side is 0"):
            raw_pixels(source, source.keys, side=0)


class TestStatistics:
    def test_43_finite_numbers_for_rgb_in_the_order_of_the_keys(self, source):
        found = image_statistics(source, source.keys)
        assert found.shape == (23, 43)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert np.array_equal(found[::-1], image_statistics(source, source.keys[::-1]))

    def test_moments_and_percentiles_of_a_band(self, source):
        key = source.keys[0]
        red = source.images[key][0] / 255.0
        expected = [red.mean(), red.std(), *np.percentile(red, [5, 25, 50, 75, 95])]
        np.testing.assert_allclose(image_statistics(source, [key])[0, :7], expected, rtol=1e-5)

    def test_orientation_tells_rows_from_columns(self, make_source):
        source = make_source({"rows": stripes(0), "columns": stripes(1)})
        rows, columns = image_statistics(source, ["rows", "columns"])
        np.testing.assert_allclose(rows[:29], columns[:29], atol=1e-6)
        # Stripes along rows change downwards: 90 degrees, the third of four bins.
        assert rows[29:33].tolist() == [0.0, 0.0, 1.0, 0.0]
        assert columns[29:33].tolist() == [1.0, 0.0, 0.0, 0.0]

    def test_pixels_without_data_have_no_say(self, make_source):
        clean = np.random.default_rng(0).integers(0, 200, (3, 24, 24), dtype=np.uint8)
        dirty = clean.copy()
        dirty[:, 12:] = 255
        source = make_source({"a": clean[:, :12], "b": dirty})
        source.valid["b"] = np.arange(24)[:, None].repeat(24, 1) < 12
        whole, masked = image_statistics(source, ["a", "b"])
        np.testing.assert_allclose(masked, whole, atol=1e-6)

    def test_tiny_and_flat_images_are_finite(self, make_source):
        images = {"a": np.zeros((3, 1, 1), np.uint8), "b": np.full((3, 30, 30), 9, np.uint8)}
        assert np.isfinite(image_statistics(make_source(images), ["a", "b"])).all()

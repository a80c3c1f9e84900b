from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as reference

from dino_adapters.contracts import ShapeError
from dino_adapters.data.resize import shorter_side, to_square


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand(channels, height, width, generator=generator)


class TestShorterSide:
    @settings(deadline=None, derandomize=True, max_examples=50)
    @given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
    def test_sizes(self, height: int, width: int, size: int):
        made = shorter_side(image(height, width), size)
        assert min(made.shape[-2:]) == size
        assert (height <= width) == (made.shape[1] <= made.shape[2]) or min(made.shape[1:]) == size
        exact = max(height, width) * size / min(height, width)
        assert abs(max(made.shape[-2:]) - exact) <= 0.5

    def test_equals_torchvision(self):
        source = image(40, 60)
        expected = reference.resize(
            source, [20, 30], antialias=True, interpolation=reference.InterpolationMode.BICUBIC
        )
        assert torch.allclose(shorter_side(source, 20), expected.clamp(0, 1), atol=1e-6)

    def test_same_size_is_the_image_itself(self):
        source = image(20, 30)
        assert shorter_side(source, 20) is source

    def test_thirteen_channels_resize_one_by_one(self):
        source = image(30, 20, 13)
        made = shorter_side(source, 8)
        for channel in range(13):
            alone = shorter_side(source[channel : channel + 1], 8)
            assert torch.allclose(made[channel], alone[0], atol=1e-6)


class TestToSquare:
    @pytest.mark.parametrize("fit", ["crop", "squash"])
    @pytest.mark.parametrize("shape", [(7, 31), (31, 7), (16, 16), (1, 1), (1, 50)])
    def test_always_square(self, fit: str, shape: tuple[int, int]):
        assert to_square(image(*shape), 16, fit).shape == (3, 16, 16)

    def test_crop_is_the_centre(self):
        source = image(16, 26)
        assert torch.equal(to_square(source, 16), source[:, :, 5:21])
        assert torch.equal(to_square(source, 16), reference.center_crop(source, [16, 16]))

    def test_squash_keeps_what_crop_cuts_off(self):
        source = torch.zeros(1, 16, 48)
        source[:, :, 40:] = 1.0
        assert to_square(source, 16).sum() == 0
        assert to_square(source, 16, "squash").sum() > 0

    def test_overshoot_is_clamped_only_for_images_in_range(self):
        edge = torch.zeros(1, 12, 12)
        edge[:, :, 6:] = 1.0
        made = to_square(edge, 24)
        assert made.min() == 0.0
        assert made.max() == 1.0
        shifted = to_square(edge * 4 - 2, 24)
        assert shifted.max() > 2.0

    @settings(deadline=None, derandomize=True, max_examples=30)
    @given(st.integers(2, 40), st.integers(2, 40), st.floats(0.0, 1.0))
    def test_a_plain_image_stays_plain(self, height: int, width: int, value: float):
        made = to_square(torch.full((2, height, width), value), 10)
        assert torch.allclose(made, torch.full((2, 10, 10), value), atol=1e-5)

    def test_reduction_averages_instead_of_skipping(self):
        stripes = torch.zeros(1, 64, 64)
        stripes[:, :, ::2] = 1.0
        assert (to_square(stripes, 8) - 0.5).abs().max() < 0.05

    def test_refusals(self):
        with pytest.raises(ShapeError, match="Choose crop or squash"):
            to_square(image(8, 8), 8, "stretch")
        for wrong in (torch.zeros(8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), image(0, 4)):
            with pytest.raises(ShapeError, match="float image"):
                to_square(wrong, 8)
        with pytest.raises(ShapeError, match="size 0"):
            shorter_side(image(8, 8), 0)

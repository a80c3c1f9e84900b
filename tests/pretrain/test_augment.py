"""Multi-crop: layout, ranges, frequencies, and that nothing depends on hidden state."""

import logging

import pytest
import torch

from dino_adapters.contracts import RGB, BackboneInfo, Band
from dino_adapters.pretrain.augment import MultiCrop, chroma_matrices, random_boxes
from dino_adapters.recipes.pretrain import CropsRecipe


def info(bands=RGB):
    return BackboneInfo(
        "x", "vit", 8, 8, 1, 0, bands=bands, mean=(0.0,) * len(bands), std=(1.0,) * len(bands)
    )


def plain(**changes):
    off = {"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}
    return CropsRecipe(**{"horizontal_flip": False, **off, **changes})


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(count=6, bands=3, side=48):
    return torch.rand(count, bands, side, side, generator=draws(9))


def test_shapes_and_crop_major_order():
    # Every image has a constant colour of its own, so a view tells which image it came from.
    images = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 3, 40, 40)
    global_crops, local_crops = MultiCrop(plain(), info())(images, draws())
    assert local_crops is not None
    assert global_crops.shape == (2 * 5, 3, 64, 64)
    assert local_crops.shape == (4 * 5, 3, 32, 32)
    for crops in (global_crops, local_crops):
        colours = crops.mean(dim=(1, 2, 3)).view(-1, 5)
        torch.testing.assert_close(colours, torch.linspace(0.1, 0.9, 5).expand_as(colours))


def test_same_generator_same_views_and_other_seed_other_views():
    views = MultiCrop(CropsRecipe(), info())
    first = views(photographs(), draws(1))[0]
    assert torch.equal(first, views(photographs(), draws(1))[0])
    assert not torch.equal(first, views(photographs(), draws(2))[0])


def test_values_stay_in_range_before_normalisation():
    views = MultiCrop(CropsRecipe(solarize=1.0, jitter=1.0), info())
    for crops in views(photographs(), draws()):
        assert crops is not None
        assert float(crops.min()) >= -1e-5  # rounding of the blur's sums
        assert float(crops.max()) <= 1.0 + 1e-5


def test_normalisation_uses_the_networks_numbers():
    network = BackboneInfo("x", "vit", 8, 8, 1, 0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    images = torch.full((2, 3, 40, 40), 0.4)
    crops = MultiCrop(plain(), network)(images, draws())[0]
    expected = torch.tensor([0.6, 0.8, 0.5])[:, None, None].expand(3, 64, 64)
    torch.testing.assert_close(crops[0], expected)


@pytest.mark.parametrize(("probability", "slot"), [(0.0, 0), (0.9, 1), (0.5, 2)])
def test_blur_comes_as_often_as_asked(probability, slot):
    checker = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    images = checker.float().expand(200, 3, 32, 32)
    recipe = plain(
        blur=(0.0, 0.9, 0.5), blur_sigma=(1.5, 2.0), global_scale=(1.0, 1.0), local_scale=(1.0, 1.0)
    ).model_copy(update={"global_size": 32, "local_size": 32, "local_count": 1})
    global_crops, local_crops = MultiCrop(recipe, info())(images, draws())
    assert local_crops is not None
    crops = [global_crops[:200], global_crops[200:], local_crops][slot]
    # Full-area boxes of another aspect blur a little by themselves; a real blur leaves no contrast.
    share = float((crops.std(dim=(1, 2, 3)) < 0.1).float().mean())
    assert abs(share - probability) < 0.12


def test_solarise_spares_the_first_view():
    images = torch.full((50, 3, 32, 32), 0.75)
    crops = MultiCrop(plain(solarize=1.0), info())(images, draws())[0]
    torch.testing.assert_close(crops[:50].mean(), torch.tensor(0.75))
    torch.testing.assert_close(crops[50:].mean(), torch.tensor(0.25))


def test_half_of_the_views_are_mirrored():
    ramp = torch.linspace(0, 1, 32).expand(300, 3, 32, 32)
    crops = MultiCrop(plain(horizontal_flip=True), info())(ramp, draws())[0]
    falling = (crops[:, 0, :, 0] > crops[:, 0, :, -1]).float().mean()
    assert 0.4 < float(falling) < 0.6


def test_grayscale_makes_bands_equal():
    crops = MultiCrop(plain(grayscale=1.0), info())(photographs(), draws())[0]
    torch.testing.assert_close(crops[:, 0], crops[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(crops[:, 0], crops[:, 2], atol=1e-5, rtol=0)


def test_colour_maps_keep_grey_and_luma():
    saturation, hue = torch.tensor([0.0, 0.7, 1.3]), torch.tensor([0.5, -0.3, 0.1])
    maps = chroma_matrices(saturation, hue)
    torch.testing.assert_close(maps @ torch.ones(3), torch.ones(3, 3))
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luma @ maps, luma.expand(3, 3))
    identity = chroma_matrices(torch.ones(1), torch.zeros(1))[0]
    torch.testing.assert_close(identity, torch.eye(3))


@pytest.mark.parametrize("bands", [1, 2, 13])
def test_other_bands_say_once_what_is_off(bands, caplog):
    named = tuple(Band(f"b{i}") for i in range(bands))
    with caplog.at_level(logging.WARNING):
        views = MultiCrop(CropsRecipe(), info(named))
    assert "saturation, hue, grayscale and solarise are off" in caplog.text
    crops = views(photographs(bands=bands), draws())[0]
    assert crops.shape == (12, bands, 64, 64)
    assert torch.isfinite(crops).all()


@pytest.mark.parametrize("size", [(40, 40), (12, 90), (90, 12)])
def test_boxes_lie_inside_and_have_the_area(size):
    top, left, height, width = random_boxes(500, size, (0.3, 0.6), draws())
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    aspect = width / height
    assert (aspect > 0.6).all()
    assert (aspect < 1.6).all()
    if size == (40, 40):
        share = height * width / 1600
        assert (share > 0.27).all()
        assert (share < 0.63).all()
        assert abs(float(share.mean()) - 0.45) < 0.03

"""Multi-crop: layout, ranges, frequencies, and that nothing depends on hidden state."""

import logging

import pytest
import torch
from torch.nn.functional import interpolate

from dino_adapters.contracts import RGB, BackboneInfo, Band, RecipeError
from dino_adapters.pretrain.augment import MultiCrop, Sizes, random_boxes
from dino_adapters.pretrain.colour import chroma_matrices
from dino_adapters.pretrain.dice import Dice
from dino_adapters.recipes.sections import CropsRecipe


def info(bands=RGB):
    return BackboneInfo(
        "x", "vit", 8, 8, 1, 0, bands=bands, mean=(0.0,) * len(bands), std=(1.0,) * len(bands)
    )


def plain(**changes):
    off = {"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}
    return CropsRecipe(**{"horizontal_flip": False, **off, **changes})


def dice(images, seed=0):
    return Dice(draws(seed), len(images))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(count=6, bands=3, side=48):
    return torch.rand(count, bands, side, side, generator=draws(9))


def test_shapes_and_crop_major_order():
    # Every image has a constant colour of its own, so a view tells which image it came from.
    images = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 3, 40, 40)
    global_crops, local_crops, _ = MultiCrop(plain(), info())(images, dice(images))
    assert local_crops is not None
    assert global_crops.shape == (2 * 5, 3, 64, 64)
    assert local_crops.shape == (4 * 5, 3, 32, 32)
    for crops in (global_crops, local_crops):
        colours = crops.mean(dim=(1, 2, 3)).view(-1, 5)
        torch.testing.assert_close(colours, torch.linspace(0.1, 0.9, 5).expand_as(colours))


def test_same_generator_same_views_and_other_seed_other_views():
    views = MultiCrop(CropsRecipe(), info())
    first = views(photographs(), dice(photographs(), 1))[0]
    assert torch.equal(first, views(photographs(), dice(photographs(), 1))[0])
    assert not torch.equal(first, views(photographs(), dice(photographs(), 2))[0])


def test_values_stay_in_range_before_normalisation():
    views = MultiCrop(CropsRecipe(solarize=1.0, jitter=1.0), info())
    for crops in views(photographs(), dice(photographs()))[:2]:
        assert crops is not None
        assert float(crops.min()) >= -1e-5  # rounding of the blur's sums
        assert float(crops.max()) <= 1.0 + 1e-5


def test_normalisation_uses_the_networks_numbers():
    network = BackboneInfo("x", "vit", 8, 8, 1, 0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    images = torch.full((2, 3, 40, 40), 0.4)
    crops = MultiCrop(plain(), network)(images, dice(images))[0]
    expected = torch.tensor([0.6, 0.8, 0.5])[:, None, None].expand(3, 64, 64)
    torch.testing.assert_close(crops[0], expected)


@pytest.mark.parametrize(("probability", "slot"), [(0.0, 0), (0.9, 1), (0.5, 2)])
def test_blur_comes_as_often_as_asked(probability, slot):
    checker = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    images = checker.float().expand(200, 3, 32, 32)
    recipe = plain(
        blur=(0.0, 0.9, 0.5), blur_sigma=(1.5, 2.0), global_scale=(1.0, 1.0), local_scale=(1.0, 1.0)
    ).model_copy(update={"global_size": 32, "local_size": 32, "local_count": 1})
    global_crops, local_crops, _ = MultiCrop(recipe, info())(images, dice(images))
    assert local_crops is not None
    crops = [global_crops[:200], global_crops[200:], local_crops][slot]
    # Full-area boxes of another aspect blur a little by themselves; a real blur leaves no contrast.
    share = float((crops.std(dim=(1, 2, 3)) < 0.1).float().mean())
    assert abs(share - probability) < 0.12


@pytest.mark.parametrize("distort", [False, True])
def test_solarise_and_blur_spare_the_first_view_with_gram_crops_too(distort):
    images = torch.full((20, 3, 32, 32), 0.75)
    crops = MultiCrop(plain(solarize=1.0), info())
    global_crops, _, gram = crops(images, dice(images), Sizes(32, 16, 48), distort_gram=distort)
    assert gram is not None
    torch.testing.assert_close(global_crops[20:].mean(), torch.tensor(0.25))
    for views in (global_crops[:20], gram[:20]):
        torch.testing.assert_close(views.mean(), torch.tensor(0.75))
    torch.testing.assert_close(gram[20:].mean(), torch.tensor(0.25 if distort else 0.75))


def test_solarise_spares_the_first_view():
    images = torch.full((50, 3, 32, 32), 0.75)
    crops = MultiCrop(plain(solarize=1.0), info())(images, dice(images))[0]
    torch.testing.assert_close(crops[:50].mean(), torch.tensor(0.75))
    torch.testing.assert_close(crops[50:].mean(), torch.tensor(0.25))


def test_half_of_the_views_are_mirrored():
    ramp = torch.linspace(0, 1, 32).expand(300, 3, 32, 32)
    crops = MultiCrop(plain(horizontal_flip=True), info())(ramp, dice(ramp))[0]
    falling = (crops[:, 0, :, 0] > crops[:, 0, :, -1]).float().mean()
    assert 0.4 < float(falling) < 0.6


def test_grayscale_makes_bands_equal():
    crops = MultiCrop(plain(grayscale=1.0), info())(photographs(), dice(photographs()))[0]
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
    crops = views(photographs(bands=bands), dice(photographs(bands=bands)))[0]
    assert crops.shape == (12, bands, 64, 64)
    assert torch.isfinite(crops).all()


@pytest.mark.parametrize("size", [(40, 40), (12, 90), (90, 12)])
def test_boxes_lie_inside_and_have_the_area(size):
    top, left, height, width = random_boxes(size, (0.3, 0.6), Dice(draws(), 500))
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


def smooth(count=6, side=96):
    """Images without fine detail, away from 0 and 1: how they are resized matters little."""
    knots = 0.2 + 0.6 * torch.rand(count, 3, 6, 6, generator=draws(3))
    return interpolate(knots, size=side, mode="bicubic")


def shrunk(crops, size):
    return interpolate(crops, size=size, mode="bicubic", antialias=True)


def correlations(a, b):
    """Pearson correlation of each pair of single-band maps `(B, H, W)`."""
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_sizes_hold_for_one_call():
    views = MultiCrop(plain(), info())
    for sizes in (Sizes(48, 16, 72), Sizes(32, 24)):
        global_crops, local_crops, gram = views(photographs(), dice(photographs()), sizes)
        assert local_crops is not None
        assert global_crops.shape[-2:] == (sizes.global_size,) * 2
        assert local_crops.shape[-2:] == (sizes.local_size,) * 2
        assert (gram is None) == (sizes.gram_size is None)
        if gram is not None:
            assert gram.shape == (12, 3, 72, 72)
    assert views(photographs(), dice(photographs()))[0].shape[-1] == 64


def test_the_size_changes_no_draw():
    """The same boxes, colours and flips: a crop at half the size is the crop, shrunk."""
    views = MultiCrop(plain(horizontal_flip=True, jitter=1.0, solarize=0.0), info())
    images = smooth()
    large = views(images, dice(images), Sizes(64, 32))
    small = views(images, dice(images), Sizes(32, 16))
    for big, little in zip(large[:2], small[:2], strict=True):
        assert big is not None
        assert little is not None
        torch.testing.assert_close(shrunk(big, little.shape[-1]), little, atol=0.05, rtol=0)


def test_gram_crops_leave_the_other_crops_alone():
    views = MultiCrop(CropsRecipe(vertical_flip=True), info())
    without = views(photographs(), dice(photographs()), Sizes(64, 32))
    with_gram = views(photographs(), dice(photographs()), Sizes(64, 32, 96))
    assert without[2] is None
    assert torch.equal(without[0], with_gram[0])
    assert without[1] is not None
    assert with_gram[1] is not None
    assert torch.equal(without[1], with_gram[1])
    again = views(photographs(), dice(photographs()))
    assert torch.equal(without[0], again[0])


@pytest.mark.parametrize("distort", [False, True])
@pytest.mark.parametrize("size", [24, 32, 48, 64])
def test_without_photometrics_a_gram_crop_is_its_global_crop(size, distort):
    recipe = plain(horizontal_flip=True, vertical_flip=True)
    network = BackboneInfo("x", "vit", 8, 8, 1, 0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    views = MultiCrop(recipe, network)
    global_crops, _, gram = views(
        smooth(), dice(smooth()), Sizes(32, 16, size), distort_gram=distort
    )
    assert gram is not None
    if size == 32:
        assert torch.equal(gram, global_crops)
    elif size > 32:
        # Made straight from the image, or (distorted) from the Gram crop itself.
        tolerance = 1e-4 if distort else 0.06
        torch.testing.assert_close(shrunk(gram, 32), global_crops, atol=tolerance, rtol=0)
    else:
        torch.testing.assert_close(shrunk(global_crops, size), gram, atol=0.06, rtol=0)


def test_gram_crops_correlate_with_their_global_crops_and_with_no_others():
    # Grey ramps and spots survive any colour jitter; mirroring or another box would not be hidden.
    images = smooth(count=8).mean(dim=1, keepdim=True).expand(8, 3, 96, 96)
    views = MultiCrop(CropsRecipe(solarize=0.0, vertical_flip=True), info())
    global_crops, _, gram = views(images, dice(images), Sizes(32, 16, 64))
    assert gram is not None
    grey, gram_grey = global_crops.mean(dim=1), shrunk(gram, 32).mean(dim=1)
    assert float(correlations(grey, gram_grey).min()) > 0.9
    assert float(correlations(grey.roll(8, 0), gram_grey).mean()) < 0.7
    assert float(correlations(grey.flip(2), gram_grey).mean()) < 0.7


def test_undistorted_gram_crops_keep_the_pixels_of_the_image():
    """Whatever is done to the global crop: a constant image stays what it was."""
    images = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 3, 40, 40)
    views = MultiCrop(CropsRecipe(jitter=1.0, solarize=1.0), info())
    gram = views(images, dice(images), Sizes(32, 16, 48))[2]
    assert gram is not None
    expected = torch.cat([images[:, :, :1, :1]] * 2).expand(10, 3, 48, 48)
    torch.testing.assert_close(gram, expected)


def test_distorted_gram_crops_are_the_distorted_view():
    views = MultiCrop(CropsRecipe(jitter=1.0, solarize=0.5), info())
    global_crops, _, gram = views(smooth(), dice(smooth()), Sizes(32, 16, 64), distort_gram=True)
    assert gram is not None
    torch.testing.assert_close(shrunk(gram, 32), global_crops, atol=1e-4, rtol=0)
    plain_gram = views(smooth(), dice(smooth()), Sizes(32, 16, 64))[2]
    assert plain_gram is not None
    assert float((gram - plain_gram).abs().mean()) > 0.05


def test_the_blur_of_distorted_gram_crops_is_as_wide_as_that_of_global_crops():
    """Blurred at twice the size with twice the sigma: the same picture, but for the resizing."""
    recipe = plain(blur=(1.0, 1.0, 0.0), blur_sigma=(0.8, 1.2), global_scale=(1.0, 1.0))
    images = smooth(side=64)
    views = MultiCrop(recipe, info())
    usual = views(images, dice(images), Sizes(32, 16))[0]
    from_gram = views(images, dice(images), Sizes(32, 16, 64), distort_gram=True)[0]
    unblurred = MultiCrop(plain(global_scale=(1.0, 1.0)), info())(
        images, dice(images), Sizes(32, 16)
    )[0]
    assert float((usual - unblurred).abs().mean()) > 0.01
    assert float((from_gram - usual).abs().mean()) < 0.003


@pytest.mark.parametrize("sides", [(0, 16, None), (32, -1, None), (32, 16, 0)])
def test_sides_below_one_are_refused(sides):
    with pytest.raises(RecipeError, match=r"_size is -?\d\. A crop has"):
        Sizes(*sides)


@pytest.mark.parametrize("named", [RGB, tuple(Band(f"b{i}") for i in range(5))])
def test_an_image_gets_the_same_views_however_the_batch_is_divided(named):
    views, images = MultiCrop(CropsRecipe(), info(named)), photographs(bands=len(named))
    whole = views(images, dice(images), Sizes(32, 16, 48))
    for first, count in ((0, 1), (1, len(images) - 1)):
        part = images[first : first + count]
        found = views(part, Dice(draws(), len(images), first, count), Sizes(32, 16, 48))
        for all_rows, rows in zip(whole, found, strict=True):
            assert all_rows is not None
            expected = all_rows.unflatten(0, (-1, len(images)))[:, first : first + count]
            torch.testing.assert_close(rows, expected.flatten(0, 1))

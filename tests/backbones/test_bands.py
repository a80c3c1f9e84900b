"""Spreading of filters: domains.md section 4, D29 to D32."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dino_adapters.backbones import build_network
from dino_adapters.backbones.bands import (
    SPREADS,
    band_statistics,
    check_bands,
    spread_filters,
    untrained_names,
)
from dino_adapters.contracts import RGB, Band, RecipeError, UnitsError
from dino_adapters.runtime.console import Notices

NAMES = ("red", "green", "blue")
MANY = ("coastal", "blue", "green", "red", "edge1", "edge2", "edge3", "nir", "swir1", "swir2")
BANDS = {name: Band(name, "reflectance", None, 0.0, 1.0) for name in MANY}
WEIGHT = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def correlated(count, rho, seed=0, side=64):
    """Bands of mean 0 and deviation 1 whose pairwise correlation is about `rho`."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(16, 1, side, side, generator=generator)
    own = torch.randn(16, count, side, side, generator=generator)
    return rho**0.5 * shared + (1 - rho) ** 0.5 * own


class TestFilters:
    def test_by_name_finds_each_band_in_any_order(self):
        found = spread_filters(WEIGHT, NAMES, MANY, "by_name")
        scale = 3 / len(MANY)
        for place, name in enumerate(MANY):
            source = WEIGHT[:, NAMES.index(name)] if name in NAMES else WEIGHT.mean(1)
            assert torch.allclose(found[:, place], source * scale, atol=1e-6), name

    def test_repeat_is_timms_rule(self):
        conv = timm.models.adapt_input_conv(7, WEIGHT.clone())
        found = spread_filters(WEIGHT, NAMES, tuple("abcdefg"), "repeat")
        assert torch.allclose(found, conv, atol=1e-6)

    def test_mean_is_one_filter_for_all(self):
        found = spread_filters(WEIGHT, NAMES, MANY, "mean")
        for place in range(len(MANY)):
            assert torch.allclose(found[:, place], WEIGHT.mean(1) * 0.3, atol=1e-6)

    def test_zero_leaves_known_bands_as_they_are(self):
        found = spread_filters(WEIGHT, NAMES, MANY, "zero")
        for place, name in enumerate(MANY):
            expected = WEIGHT[:, NAMES.index(name)] if name in NAMES else torch.zeros(32, 8, 8)
            assert torch.equal(found[:, place], expected)
        with pytest.raises(RecipeError, match=r"spread=zero keeps.*red"):
            spread_filters(WEIGHT, NAMES, ("blue", "green", "nir"), "zero")

    @pytest.mark.parametrize("how", ["by_name", "mean", "repeat"])
    def test_one_band_equals_copying_it(self, how):
        """D31."""
        image = torch.randn(2, 1, 32, 32)
        copied = F.conv2d(image.expand(-1, 3, -1, -1), WEIGHT, stride=8)
        single = F.conv2d(image, spread_filters(WEIGHT, NAMES, ("pan",), how), stride=8)
        # Outputs are of size 14: relative to that.
        assert (single - copied).abs().max() < 1e-5 * copied.abs().max()

    @pytest.mark.parametrize("how", ["by_name", "mean", "repeat"])
    @pytest.mark.parametrize("count", [4, 6, 10])
    @pytest.mark.parametrize("rho", [0.8, 0.95])
    def test_activations_keep_their_size(self, how, count, rho, record_property):
        """D29."""
        before = F.conv2d(correlated(3, rho), WEIGHT, stride=8).std()
        names = MANY[-count:] if how != "by_name" else MANY[:count]
        filters = spread_filters(WEIGHT, NAMES, names, how)
        after = F.conv2d(correlated(count, rho), filters, stride=8).std()
        record_property("ratio", float(after / before))
        print(f"{how} {count} bands, correlation {rho}: ratio {after / before:.3f}")
        assert 0.8 <= after / before <= 1.25

    @given(
        want=st.lists(st.sampled_from(MANY), min_size=1, unique=True),
        how=st.sampled_from([how for how in SPREADS if how != "zero"]),
    )
    @settings(deadline=None, derandomize=True)
    def test_shapes_grey_response_and_names(self, want, how: Any):
        found = spread_filters(WEIGHT, NAMES, want, how)
        assert found.shape == (32, len(want), 8, 8)
        if how == "mean":  # a grey image is answered as before
            assert torch.allclose(found.sum(1), WEIGHT.sum(1), atol=1e-5)
        assert set(untrained_names(NAMES, want, how)) <= set(want)

    def test_same_bands_are_a_copy(self):
        rules: Any = SPREADS
        for how in rules:
            found = spread_filters(WEIGHT, NAMES, NAMES, how)
            assert torch.equal(found, WEIGHT)
            assert found.data_ptr() != WEIGHT.data_ptr()

    def test_refusals(self):
        with pytest.raises(RecipeError, match=r"spread is 'tile'"):
            spread_filters(WEIGHT, NAMES, MANY, "tile")  # pyright: ignore[reportArgumentType]
        for want in ((), ("nir", "nir")):
            with pytest.raises(RecipeError, match="Name every band once"):
                spread_filters(WEIGHT, NAMES, want)


def test_untrained_names():
    want = ("red", "nir", "blue", "green")
    assert untrained_names(NAMES, want, "by_name") == ("nir",)
    assert untrained_names(NAMES, want, "zero") == ("nir",)
    assert untrained_names(NAMES, want, "mean") == want
    assert untrained_names(NAMES, want, "repeat") == ("nir", "green")
    assert untrained_names(NAMES, ("pan",), "by_name") == ()
    assert untrained_names(NAMES, NAMES[::-1], "by_name") == ()


def sources(scatter):
    vit, _ = build_network("vitmicro8")
    cnx, _ = build_network(
        "cnx_tiny", architecture={"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    )
    return {
        "vit": scatter(vit),
        "convnext": scatter(cnx),
        "timm": timm.create_model("resnet10t", num_classes=0).eval(),
        "timm_vit": timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, depth=2, dynamic_img_size=True
        ).eval(),
    }


@pytest.mark.parametrize("kind", ["vit", "convnext", "timm", "timm_vit"])
@torch.no_grad()
def test_whole_networks(kind, scatter):
    """D30 and D31 through build_network."""
    source = sources(scatter)[kind]
    rgb, _ = build_network(source)
    bands = tuple(BANDS[name] for name in MANY)
    many = torch.randn(2, len(MANY), 64, 96)
    seen = many[:, [MANY.index(name) for name in NAMES]]
    zero, info = build_network(source, bands=bands, spread="zero")
    assert (zero(many).patches - rgb(seen).patches).abs().max() < 1e-5
    assert set(info.untrained_bands) == set(MANY) - set(NAMES)
    grey, info = build_network(source, bands=(Band("grey"),))
    one = torch.randn(2, 1, 64, 96)
    expected = rgb(one.expand(-1, 3, -1, -1))
    assert (grey(one).cls - expected.cls).abs().max() < 1e-5 * max(1, expected.cls.abs().max())
    assert info.untrained_bands == ()
    spread, info = build_network(source, bands=bands)
    assert spread(many).cls.shape == expected.cls.shape
    assert tuple(band.name for band in info.bands) == MANY


class TestStatistics:
    def test_known_names_keep_theirs_and_others_get_the_centre(self):
        notices = Notices()
        want = (BANDS["nir"], BANDS["blue"])
        known = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        mean, std = band_statistics(RGB, want, known, (None, None), notices)
        assert (mean, std) == ((0.5, 0.3), (0.25, 0.6))
        assert any("nir" in line and "blue" not in line for line in notices.summary())

    def test_what_is_given_counts_and_says_nothing(self):
        notices = Notices()
        known = ((0.1,) * 3, (0.4,) * 3)
        given_ = ((0.3, 0.2), (1.0, 2.0))
        found = band_statistics(RGB, (BANDS["nir"], BANDS["blue"]), known, given_, notices)
        assert found == given_
        assert not notices.summary()

    def test_wrong_lengths_and_signs_are_refused(self):
        known = ((0.1,) * 3, (0.4,) * 3)
        with pytest.raises(UnitsError, match="holds 2 numbers for 3 bands"):
            band_statistics(RGB, RGB, known, ((0.1, 0.2), None), Notices())
        for wrong in (0.0, -1.0, float("nan")):
            with pytest.raises(UnitsError, match="needs a number above 0"):
                band_statistics(RGB, RGB, known, (None, (1.0, wrong, 1.0)), Notices())


def test_bands_are_bands():
    assert check_bands(list(RGB)) == RGB
    with pytest.raises(RecipeError, match="bands is empty"):
        check_bands([])

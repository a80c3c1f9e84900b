"""Pictures: PCA colours against the definition, and grids that hold what they say."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from dino_adapters.contracts import DataError, ShapeError
from dino_adapters.study.pictures import (
    Neighbours,
    attention_maps,
    neighbour_strips,
    pca_colours,
    pca_pictures,
)


def images(count=3, side=48, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def opened(markup):
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', markup)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in found]


def test_pca_is_one_projection_for_all_images():
    tokens = np.random.default_rng(0).normal(size=(3, 4, 5, 16)) * np.linspace(3, 0.1, 16)
    flat = tokens.reshape(-1, 16)
    centred = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    colours = pca_colours(tokens).reshape(-1, 3).astype(float)
    for component in range(3):
        seen = centred @ directions[component]
        low, high = np.percentile(seen, (2, 98))
        inside = (seen > low) & (seen < high)
        assert abs(np.corrcoef(colours[inside, component], seen[inside])[0, 1]) > 0.9999


def test_pca_does_not_depend_on_the_sign_of_the_axes_nor_on_a_shift():
    tokens = np.random.default_rng(0).normal(size=(2, 4, 4, 8)) * np.linspace(2, 1, 8)
    np.testing.assert_array_equal(pca_colours(tokens), pca_colours(tokens + 5.0))


def test_pca_of_constant_tokens_is_grey():
    assert (pca_colours(np.ones((2, 3, 3, 8))) == 128).all()


def test_pca_of_two_dimensions_leaves_the_third_colour_grey():
    tokens = np.random.default_rng(0).normal(size=(2, 4, 4, 2))
    colours = pca_colours(tokens)
    assert (colours[..., 2] == 128).all()
    assert colours[..., 0].std() > 0


def test_pca_pictures_have_a_pixel_a_patch():
    figure = pca_pictures(images(), {"net <a>": np.random.default_rng(0).normal(size=(3, 6, 6, 9))})
    sizes = [picture.size for picture in opened(figure.markup)]
    assert sizes == [(48, 48)] * 3 + [(6, 6)] * 3
    assert "net &lt;a&gt;" in figure.markup
    assert "<a>" not in figure.markup


def test_attention_is_bright_where_it_is_high():
    maps = np.zeros((1, 6, 6))
    maps[0, :3] = 1.0
    figure = attention_maps([np.full((60, 60, 3), 100, np.uint8)], {"net": maps})
    over = np.asarray(opened(figure.markup)[1].convert("L"), float)
    assert over[:20].mean() > over[-20:].mean() + 50


def test_constant_attention_is_dark_and_not_nan():
    figure = attention_maps(images(1), {"net": np.full((1, 4, 4), 0.25)})
    assert np.asarray(opened(figure.markup)[1]).max() < 120


def test_neighbours_are_marked_by_sign_and_counted():
    a, b, c = images()
    strip = Neighbours((a, "cat"), ((b, "cat"), (c, "dog")))
    figure = neighbour_strips({"frozen": [strip], "continued": [strip]})
    assert figure.title == "Neighbours of the query's own class: frozen 1 of 2; continued 1 of 2."
    assert "✓ cat" in figure.markup
    assert "✗ dog" in figure.markup
    assert len(opened(figure.markup)) == 6


def test_neighbours_without_labels_claim_nothing():
    a, b, _ = images()
    figure = neighbour_strips({"frozen": [Neighbours((a, ""), ((b, ""),))]})
    assert "✓" not in figure.markup
    assert "✗" not in figure.markup
    assert "cosine" in figure.title


def test_large_pictures_become_thumbnails():
    figure = pca_pictures(images(1, side=500), {"net": np.zeros((1, 2, 2, 4))})
    assert max(opened(figure.markup)[0].size) <= 112


def test_refusals():
    with pytest.raises(ShapeError, match=r"expected \(3, h, w, D\)"):
        pca_pictures(images(), {"net": np.zeros((2, 4, 4, 8))})
    with pytest.raises(ShapeError, match="Average over heads"):
        attention_maps(images(), {"net": np.zeros((3, 6, 4, 4))})
    with pytest.raises(ShapeError, match="expected \\(H, W, 3\\) uint8"):
        pca_pictures([np.zeros((8, 8, 3))], {})
    with pytest.raises(DataError, match="no query image"):
        neighbour_strips({})

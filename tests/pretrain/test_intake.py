"""At which size images are read: so large that crops are made of pixels, and no larger."""

import pytest
import torch
from PIL import Image

from dino_adapters.data import load_source
from dino_adapters.pretrain.augment import random_boxes
from dino_adapters.pretrain.dice import Dice
from dino_adapters.pretrain.intake import Intake
from dino_adapters.runtime.console import Notices


@pytest.mark.parametrize(
    ("size", "changes", "side"),
    [
        ((300, 200), {}, 43),  # 24 / sqrt(0.32) = 42.4
        ((300, 200), {"crops": {"global_scale": (0.25, 1.0)}}, 48),
        ((300, 200), {"gram": {"size": 48}}, 85),
        ((300, 40), {}, 40),
        ((300, 200), {"data": {"image_size": 30}}, 30),
    ],
)
def test_the_side_is_that_of_the_smallest_crop_filled_with_pixels(
    tiny, tmp_path, size, changes, side
):
    changes = dict(changes)
    given = changes.pop("data", {})
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", size).save(folder / "a.png")
    recipe = tiny(data={"source": str(folder)} | given, **changes)
    found = Intake(load_source(recipe.data, notices=Notices()), recipe, Notices())
    assert found.side == side
    assert ("enlarged" in found.size_note) == (side == min(size) and not given)
    assert found.shrunk == ("into tiles" in found.size_note) == (3 * side < min(size) and not given)
    # The smallest boxes of such an image hold as many pixels as a crop, up to rounding.
    if not given and side < min(size):
        recipe_scale = recipe.crops.global_scale
        dice = Dice(torch.Generator().manual_seed(0), 2000)
        _, _, height, width = random_boxes((side, side), recipe_scale, dice)
        largest = 48 if "gram" in changes else recipe.crops.global_size
        assert (height * width).min() >= 0.95 * largest**2

"""Words of the command line to values."""

import pytest

from dino_adapters.cli.options import band_names, low_and_high, recipe_and_overrides
from dino_adapters.contracts import RecipeError


def test_the_recipe_may_be_left_out(tmp_path):
    assert recipe_and_overrides("a.py", ["b=1"]) == ("a.py", ["b=1"])
    assert recipe_and_overrides("data.source=x", ["b=1"]) == (None, ["data.source=x", "b=1"])
    odd = tmp_path / "lr=3.yaml"
    odd.write_text("steps: 3")
    assert recipe_and_overrides(str(odd), None) == (str(odd), [])


def test_bands():
    assert band_names(None) is None
    assert band_names("red, green,blue,") == ("red", "green", "blue")


@pytest.mark.parametrize("text", ["0,65535", "[0, 65535]", "(0,65535.0)"])
def test_value_range(text):
    assert low_and_high(text) == (0.0, 65535.0)
    assert low_and_high(None) is None


@pytest.mark.parametrize("text", ["5", "1,0", "a,b", "0,1,2", "0,nan", ""])
def test_no_value_range(text):
    with pytest.raises(RecipeError, match="Give two numbers"):
        low_and_high(text)

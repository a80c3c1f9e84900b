from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dino_adapters.contracts import RecipeError
from dino_adapters.recipes.read import read_recipe
from dino_adapters.recipes.task import TaskRecipe

ROOT = Path(__file__).parents[2]


def test_defaults_need_only_the_images():
    made = read_recipe(None, TaskRecipe, ["data.source=photos"])
    assert (made.split, made.head, made.shots, made.size) == ("auto", "linear", (1, 3, 5), None)


def test_lists_become_tuples():
    made = read_recipe(
        None, TaskRecipe, ["data.source=x", "size=[64,96]", "shots=[2]", "head_options={'k': 5}"]
    )
    assert made.size == (64, 96)
    assert made.shots == (2,)
    assert made.head_options == {"k": 5}
    assert read_recipe(None, TaskRecipe, ["data.source=x", "shots=[]", "size=64"]).size == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size=0", "size is 0"),
        ("size=[]", "size is"),
        ("shots=[0,1]", "shots is"),
        ("shots=[1,1]", "shots is"),
        ("fit=stretch", "'fit' is 'stretch'"),
        ("features=patches", "'features' is 'patches'"),
        ("draws=0", "'draws' is 0"),
        ("heads=knn", "Did you mean 'head'"),
        ("data.value_range=[0,1e999]", "'data.value_range.1' is inf"),
    ],
)
def test_refusals(override: str, message: str):
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, TaskRecipe, ["data.source=x", override])
    assert message in str(caught.value)


def test_options_of_the_head_are_written_as_shown():
    shown = TaskRecipe.model_fields["head_options"].description or ""
    assert "`head_options.k=20`" in shown
    made = read_recipe(None, TaskRecipe, ["data.source=x", "head_options.k=20"])
    assert made.head_options == {"k": 20}


def test_recipes_do_not_change():
    made = read_recipe(None, TaskRecipe, ["data.source=x"])
    with pytest.raises(ValidationError):
        made.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("path", sorted((ROOT / "tasks").rglob("recipe.py")), ids=str)
def test_recipes_of_the_project_are_valid(path: Path):
    made = read_recipe(path, TaskRecipe, ["data.source=x", "split=x/splits.json"])
    assert made.data.source == "x"
    header = path.read_text(encoding="utf-8")
    for word in ("Command", "Data", "Licence", "Split", "Expect", "Hardware"):
        assert f"# {word} " in header

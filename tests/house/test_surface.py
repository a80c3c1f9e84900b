"""The public surface is pinned: a change of it is a decision, with a line in the changelog."""

import importlib

import pytest

import dino_adapters

PUBLIC = (
    "Band",
    "DinoAdaptersError",
    "FeatureStore",
    "Features",
    "LinearProbe",
    "NearestMean",
    "Sample",
    "WeightedKNN",
    "embed",
    "export_backbone",
    "load_backbone",
    "pretrain",
)
ROOMS = ("backbones", "contracts", "data", "features", "heads", "measure", "pretrain")


def test_the_package_offers_what_is_documented():
    assert tuple(dino_adapters.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_and_is_documented(name):
    thing = getattr(dino_adapters, name)
    assert thing.__doc__, f"{name} says nothing about itself"


def test_dir_lists_the_surface():
    assert set(PUBLIC) <= set(dir(dino_adapters))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_backbones'"):
        dino_adapters.load_backbones  # noqa: B018


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_list_what_they_export(room):
    module = importlib.import_module(f"dino_adapters.{room}")
    names = list(module.__all__)
    # Constants, then classes, then functions, each sorted: what `ruff` (RUF022) calls sorted.
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(module, name) is not None


def test_the_version_is_one():
    from importlib import metadata

    assert metadata.version("dino-adapters") == dino_adapters.__version__

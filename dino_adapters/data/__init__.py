"""Files into samples, and samples into parts. Without torch, so that `inspect` starts quickly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dino_adapters.data.audit import Inspection, inspect
from dino_adapters.data.demo_tiles import make_tiles
from dino_adapters.data.labels import Labels, read_labels, read_table
from dino_adapters.data.photo import PhotoReader
from dino_adapters.data.raster import RasterReader
from dino_adapters.data.shots import draw_shots, read_shots, write_shots
from dino_adapters.data.source import ImageSource, load_source, open_source
from dino_adapters.data.splits import (
    Split,
    check_leaks,
    make_split,
    read_split,
    read_splits_json,
    write_split,
)
from dino_adapters.data.units import (
    check_size,
    match_bands,
    to_model,
    to_range,
    too_small,
    valid_pixels,
)

if TYPE_CHECKING:
    from dino_adapters.data.resize import shorter_side, to_square

__all__ = [
    "ImageSource",
    "Inspection",
    "Labels",
    "PhotoReader",
    "RasterReader",
    "Split",
    "check_leaks",
    "check_size",
    "draw_shots",
    "inspect",
    "load_source",
    "make_split",
    "make_tiles",
    "match_bands",
    "open_source",
    "read_labels",
    "read_shots",
    "read_split",
    "read_splits_json",
    "read_table",
    "shorter_side",
    "to_model",
    "to_range",
    "to_square",
    "too_small",
    "valid_pixels",
    "write_shots",
    "write_split",
]


def __getattr__(name: str) -> object:
    """The two functions on tensors, on first use: their file imports torch (PEP 562)."""
    if name in ("shorter_side", "to_square"):
        return getattr(importlib.import_module("dino_adapters.data.resize"), name)
    raise AttributeError(f"module 'dino_adapters.data' has no attribute '{name}'")

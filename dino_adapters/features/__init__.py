"""Frozen vectors, computed once and kept."""

from dino_adapters.features.baselines import image_statistics, raw_pixels
from dino_adapters.features.dense import (
    local_share,
    patch_consistency,
    patch_labels,
    segment_by_neighbours,
)
from dino_adapters.features.extract import embed
from dino_adapters.features.neighbours import nearest
from dino_adapters.features.pool import KINDS, unit_rows, vectors
from dino_adapters.features.store import FeatureStore, StoredFeatures, store_name

__all__ = [
    "KINDS",
    "FeatureStore",
    "StoredFeatures",
    "embed",
    "image_statistics",
    "local_share",
    "nearest",
    "patch_consistency",
    "patch_labels",
    "raw_pixels",
    "segment_by_neighbours",
    "store_name",
    "unit_rows",
    "vectors",
]

"""Kind `rope`: sines and cosines of grids, with and without augmentation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_adapters.backbones import rope

from ..case import Case, Settings

NAMES = ("shift", "jitter", "rescale")


class StoredDraws:
    """The values that the case holds for one variant and grid, in the order of the method."""

    def __init__(self, case: Case, prefix: str, limits: dict[str, float]) -> None:
        self._case, self._prefix = case, prefix
        self._left = [name for name in NAMES if name in limits]

    def uniform(self, low: float, high: float, shape: Sequence[int], *, like: Tensor) -> Tensor:
        stored = self._case.tensor(f"{self._prefix}draw_{self._left.pop(0)}")
        assert list(stored.shape) == list(shape)
        assert bool(((stored >= low) & (stored <= high)).all())
        return stored.to(like)

    def permutation(self, count: int, *, device: torch.device) -> Tensor:
        raise AssertionError("rotary positions draw no permutation")


def read(case: Case) -> None:
    config = case.settings["config"]
    head_dim = config["head_dim"]
    assert config["embed_dim"] == head_dim * config["num_heads"]
    assert config["dtype"] == "fp32"
    for variant in config["variants"]:
        _read_variant(case, variant, head_dim, config["grids"])


def _read_variant(case: Case, variant: Settings, head_dim: int, grids: list[list[int]]) -> None:
    number = variant["variant"]
    periods = rope.make_periods(
        head_dim,
        base=variant["base"],
        min_period=variant["min_period"],
        max_period=variant["max_period"],
        dtype=case.dtype,
    )
    case.check(f"w/{number}/periods", periods, bound=1e-6)
    limits = {name: variant[f"{name}_coords"] for name in NAMES if f"{name}_coords" in variant}
    for height, width in grids:
        place = f"{number}/{height}x{width}/"
        coordinates = rope.make_coordinates(
            (height, width), relative_to=variant["normalize_coords"], dtype=case.dtype
        )
        found = {"eval": rope.make_tables(coordinates, periods)}
        if limits:
            moved = rope.move_coordinates(
                coordinates, StoredDraws(case, f"in/{place}", limits), **limits
            )
            found["train"] = rope.make_tables(moved, periods)
        for mode, tables in found.items():
            for name, table in zip(("sin", "cos"), tables, strict=True):
                case.check(f"out/{place}{mode}_{name}", table)

"""A folder of small photographs, and a recipe that trains on it in a second."""

import numpy as np
import pytest
import torch
from PIL import Image

from dino_adapters.pretrain import checkpoint, loop, pretrain
from dino_adapters.pretrain.flat_state import unflatten
from dino_adapters.pretrain.labelled import LabelledSet, Squares
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.world import ALONE

TINY = {
    "model": {"source": "vitmicro8", "architecture": {"embed_dim": 24, "num_heads": 2, "depth": 2}},
    "crops": {"global_size": 24, "local_size": 16, "local_count": 2},
    "objective": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8, "prototype_norm": 1.0},
    "optim": {"batch_size": 4},
    "steps": 6,
    "checkpoint": {"every_steps": 2},
    "data": {"workers": 0},
    "device": "cpu",
    "monitor": {"every": 0.0},
}


def merged(base, changes):
    out = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if nested else value
    return out


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for index in range(10):
        rows = draws.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(rows).resize((50, 40)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def tiny(photographs):
    """Makes a recipe; keywords change its sections."""

    def make(**changes):
        told = merged(TINY, {"data": {"source": str(photographs)}})
        if "distill" in changes and "model" not in changes:
            del told["model"]
        return PretrainRecipe.model_validate(merged(told, changes))

    return make


@pytest.fixture
def labelled_of():
    """Makes a labelled set without images: queries, and where asked as many to choose by."""

    def make(labels, groups, *, gallery=False, seen=False):
        parts = {
            part: tuple(f"{part}{index:04d}" for index in range(len(labels)))
            for part in (("g", "q") if gallery else ("q",))
        }
        given = list(zip(labels, groups, strict=True))
        return LabelledSet(
            source=None,  # pyright: ignore[reportArgumentType]
            gallery=parts.get("g", ()),
            queries=parts["q"],
            labels={key: str(given[int(key[1:])][0]) for keys in parts.values() for key in keys},
            groups={
                key: f"{part}{given[int(key[1:])][1]}"
                for part, keys in parts.items()
                for key in keys
            },
            seen=seen,
            squares=Squares(None, Notices()),  # pyright: ignore[reportArgumentType]
            workers=0,
            max_unreadable=0.1,
            notices=Notices(),
        )

    return make


@pytest.fixture
def state_of():
    """Reads all tensors of a checkpoint, nested as the learner and the optimiser have them."""

    def read(path):
        tensors = checkpoint.blank(path, "", torch.device("cpu"))
        checkpoint.load(path, tensors, ALONE)
        return unflatten(tensors, checkpoint.meta_of(path).numbers)

    return read


@pytest.fixture
def in_front_of(monkeypatch):
    """Does something in front of a step; without one, puts the loop back as it was."""
    whole = loop.one_step

    def arrange(step=None, what=lambda: None):
        def interrupted(run, crops, knobs):
            if knobs.step == step:
                what()
            return whole(run, crops, knobs)

        monkeypatch.setattr(loop, "one_step", whole if step is None else interrupted)

    return arrange


@pytest.fixture
def interrupted(in_front_of):
    """Runs a training that somebody ends in front of a step."""

    def run(recipe, folder, step):
        def end():
            raise KeyboardInterrupt

        in_front_of(step, end)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, folder, quiet=True)
        in_front_of()

    return run

"""Objectives of DINO, DINOv2 and DINOv3 side by side: one micro ViT, the same images, steps, seeds.

    python benchmarks/methods.py --data DIR --labels folder --split DIR/splits.json --out runs/m

Each network is trained on the training part without labels and read at the size that is best on
the validation part. Test images are then classified by their neighbours in the training part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from grid import (
    FEW_IMAGES,
    Row,
    collect,
    image_parser,
    knn,
    markdown,
    mean_cell,
    paired_cell,
    values,
)

from dino_adapters.backbones import load_backbone
from dino_adapters.data import ImageSource, Split, load_source, read_split
from dino_adapters.features import embed, image_statistics, vectors
from dino_adapters.pretrain import pretrain
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.fewshot import evaluate_shots
from dino_adapters.study.plans import SCRATCH, scratch_plan

VARIANTS: dict[str, dict[str, Any]] = {
    "dino_v1": {
        "objective": {
            "centering": "softmax",
            "ibot_weight": 0.0,
            "regularizer": "none",
            "weight_norm": "fixed",
        },
        "optim": {"clip_each": "tensor"},
        "schedule": {"family": "v2"},
    },
    "dinov2": {
        "objective": {"weight_norm": "free"},
        "masks": {"bins": "uniform"},
        "schedule": {"family": "v2"},
    },
    "dinov3": {},
    "dinov3_kde": {"objective": {"regularizer": "kde", "regularizer_weight": 0.05}},
    "dinov3_sigreg": {"objective": {"regularizer": "sigreg", "regularizer_weight": 0.05}},
    "dinov3_none": {"objective": {"regularizer": "none"}},
}
"""What differs from the small run of `start`, which is DINOv3's objective."""
UNTRAINED, STATISTICS, REFERENCE = "untrained", "image statistics", "dinov3"
METRICS = {"knn": "k-NN", "few": "5-shot nearest mean"}


def main(words: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and prints the table."""
    reader = image_parser(__doc__ or "")
    reader.add_argument("--steps", type=int, default=500)
    reader.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="to read at")
    reader.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = reader.parse_args(words)
    names = [*arguments.variants, UNTRAINED, STATISTICS]
    seeds = range(arguments.seeds)
    # Seed by seed, so that an unfinished grid still compares all methods.
    tasks = {f"{name}_{seed}".replace(" ", "_"): (name, seed) for seed in seeds for name in names}
    rows = collect(measured, tasks, arguments)
    text = table(rows, names)
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def recipe_of(arguments: argparse.Namespace, name: str, seed: int) -> PretrainRecipe:
    """The recipe of one run: crops of 48 and 24 px of images of 128 px, the training part."""
    data = DataRecipe(source=arguments.data, labels=arguments.labels, image_size=128, workers=1)
    plan = scratch_plan(data, arguments.split, side=128, steps=arguments.steps, seed=seed)
    shared = plan.changed(FEW_IMAGES).changed(
        {
            "optim": {"batch_size": arguments.batch},
            "checkpoint": {"snapshots": 0},
            "device": arguments.device,
        }
    )
    return shared.changed(VARIANTS[name])


def measured(arguments: argparse.Namespace, name: str, seed: int) -> list[Row]:
    """Trains one network, or takes a floor, and measures it."""
    run = f"{name}_{seed}"
    recipe = recipe_of(arguments, name if name in VARIANTS else REFERENCE, seed)
    source = load_source(recipe.data)
    split = read_split(arguments.split, keys=source.keys)
    began = time.monotonic()
    if name == STATISTICS:
        keys = (*split.train, *split.val, *split.test)
        found = {key: at for at, key in enumerate(keys)}
        numbers = image_statistics(source, keys)
        train = numbers[[found[key] for key in split.train]]
        numbers = (numbers - train.mean(axis=0)) / np.maximum(train.std(axis=0), 1e-8)
        return [{"variant": name, "seed": seed, **scores(numbers, keys, source, split, seed)}]
    if name == UNTRAINED:
        export: Path | str = SCRATCH
    else:
        folder = RunFolder(arguments.out / "runs" / run)
        export = pretrain(recipe, folder, resume=True, quiet=True)
    trained = time.monotonic()
    # A folder of its own: of networks that few steps left equal, one would be refused.
    features = arguments.out / "features" / run
    row = read(arguments, export, features, source, split, seed)
    row |= {"train_s": round(trained - began, 1), "read_s": round(time.monotonic() - trained, 1)}
    return [{"variant": name, "seed": seed, "steps": arguments.steps, **row}]


def read(
    arguments: argparse.Namespace,
    export: Path | str,
    features: Path,
    source: ImageSource,
    split: Split,
    seed: int,
) -> Row:
    """Scores of one network at the size that is best on the validation part."""
    backbone = load_backbone(export, seed=derive(seed, "network"), device=arguments.device)
    keys = (*split.train, *split.val, *split.test)
    by_size: dict[int, np.ndarray] = {}
    for size in arguments.sizes:
        store = embed(backbone, source, features, size=size, keys=keys, workers=1, quiet=True)
        by_size[size] = vectors(store.read(keys), "cls_mean")
    chosen = {size: part_knn(x, keys, source, split, split.val) for size, x in by_size.items()}
    size = max(chosen, key=lambda size: (chosen[size], -size))
    return {"size": size, "val": chosen, **scores(by_size[size], keys, source, split, seed)}


def scores(x: np.ndarray, keys: Sequence[str], source: ImageSource, split: Split, seed: int) -> Row:
    """k-NN and 5-shot accuracy on the test part, of vectors `(n, D)` in the order of the keys."""
    groups = {**source.groups, **split.groups}
    few = evaluate_shots({"x": x}, keys, source.labels, groups, split, shots=(5,), seed=0)
    return {"knn": part_knn(x, keys, source, split, split.test), "few": few.mean("x")}


def part_knn(
    x: np.ndarray, keys: Sequence[str], source: ImageSource, split: Split, part: Sequence[str]
) -> float:
    """k-NN accuracy on a part, with the training part as gallery; 0 where the part is empty."""
    at = {key: index for index, key in enumerate(keys)}
    gallery = [key for key in split.train if key in source.labels]
    queries = [key for key in part if key in source.labels]
    if not queries:
        return 0.0
    first, second = (
        (x[[at[key] for key in some]], np.array([source.labels[key] for key in some]))
        for some in (gallery, queries)
    )
    return knn(*first, *second)


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line a variant: means over seeds, and differences to DINOv3 on the same seeds."""
    header = ["variant"]
    for title in METRICS.values():
        header += [f"{title}, %", f"less {REFERENCE}"]
    lines = []
    for name in names:
        line = [name]
        for metric in METRICS:
            own = values(rows, metric, variant=name)
            reference = values(rows, metric, variant=REFERENCE)
            line.append(mean_cell(own))
            line.append("" if name == REFERENCE else paired_cell(own, reference))
        lines.append(line)
    return markdown(header, lines)


if __name__ == "__main__":
    main()

"""DINOv3's phases in small: does Gram anchoring keep dense features well, does distillation pay?

    python benchmarks/phases.py --table DIR/splits.csv --out runs/p

The chain pretrain, refine (with Gram), highres, distill against the same chain without Gram, on one
pretraining, whose moving average at half of its steps is the first Gram teacher; and the distilled
student against the same network, from other random weights, trained alone for as many steps.
The table has the columns image, mask, label and split; masks are read to judge, never to train.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import FEW_IMAGES, Row, collect, knn, markdown, mean_cell, paired_cell, parser, values
from PIL import Image
from torch import Tensor

from dino_adapters.backbones import FrozenBackbone, load_backbone
from dino_adapters.data import load_source, read_table, to_model, to_square
from dino_adapters.features import (
    local_share,
    patch_consistency,
    patch_labels,
    segment_by_neighbours,
    unit_rows,
)
from dino_adapters.measure import mean_iou
from dino_adapters.pretrain import pretrain
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.plans import SCRATCH, scratch_plan

SMALL = {"embed_dim": 48, "num_heads": 2, "depth": 2}
STUDENT: dict[str, Any] = {"source": SCRATCH, "architecture": SMALL}
PHASES = ("pretrain", "refine", "highres", "distill")
METRICS = {
    "knn": "k-NN of images, %",
    "iou": "IoU of patches, %",
    "consistency": "mirror consistency",
    "local": "local share",
}


def main(words: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and prints the tables."""
    reader = parser(__doc__ or "")
    reader.formatter_class = argparse.RawDescriptionHelpFormatter
    reader.add_argument("--table", type=Path, required=True, help="CSV of images, masks, splits")
    reader.add_argument("--steps", type=int, nargs="+", default=[500, 200, 100, 300])
    reader.add_argument("--size", type=int, default=160, help="side in pixels to read at")
    reader.add_argument("--bank", type=int, default=40, help="training images that vote on patches")
    reader.add_argument("--rarest", type=int, default=10, help="images of a class that is counted")
    arguments = reader.parse_args(words)
    if len(arguments.steps) == 1:
        arguments.steps *= len(PHASES)
    tasks = {f"seed_{seed}": (seed,) for seed in range(arguments.seeds)}
    text = tables(collect(measured, tasks, arguments))
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def base_recipe(arguments: argparse.Namespace, seed: int) -> PretrainRecipe:
    """The settings that all runs share; images are read at one size, Gram or not."""
    data = DataRecipe(source=str(arguments.table), image_size=120, workers=1)
    plan = scratch_plan(data, arguments.table, side=120, steps=arguments.steps[0], seed=seed)
    return plan.changed(FEW_IMAGES).changed(
        {
            "optim": {"batch_size": arguments.batch},
            "checkpoint": {"snapshots": 0},
            "device": arguments.device,
        }
    )


def chain(arguments: argparse.Namespace, seed: int, *, gram: bool) -> PretrainRecipe:
    """All four phases; without `gram` the same steps and crops, and no Gram term."""
    first, second, third, fourth = arguments.steps
    mixture = [
        {"global_size": 64, "local_size": 24, "gram_size": 96},
        {"global_size": 96, "local_size": 48, "gram_size": 128, "probability": 0.5},
    ]
    # Schedules begin anew in every phase, so the later ones hold them still, as DINOv3's do.
    later = {"lr": 3e-4, "lr_end": 3e-4, "weight_decay": (0.1, 0.1)}
    still = {"freeze_last_layer": 0.0, "momentum": (0.99, 0.999)}
    phases: list[dict[str, Any]] = [
        {"name": "pretrain", "steps": first, "checkpoint": {"snapshots": 1}},
        {
            "name": "refine",
            "start": "state",
            "steps": second,
            "optim": later,
            "schedule": still | {"warmup": 0.0},
        },
        {
            "name": "highres",
            "start": "teacher",
            "steps": third,
            "optim": later,
            "schedule": still,
            "crops": {"mixture": mixture},
        },
        {"name": "distill", "steps": fourth, "distill": {"students": {"small": STUDENT}}},
    ]
    if gram:
        refresh = max(second // 3, 1)
        half = f"pretrain@{round(first / 2)}"
        phases[1]["gram"] = {"teacher": half, "size": 96, "refresh_every": refresh}
        phases[2]["gram"] = {"teacher": "refine"}
    return base_recipe(arguments, seed).changed({"phases": phases})


def measured(arguments: argparse.Namespace, seed: int) -> list[Row]:
    """Both chains and the student alone of one seed: a row a network."""
    runs = arguments.out / "runs"
    exam = Exam.read(arguments, base_recipe(arguments, seed))
    fresh = load_backbone(SCRATCH, seed=derive(seed, "network"), device=arguments.device)
    rows = [exam.row(fresh, "none", "untrained", seed)]
    shared: Path | None = None
    for name in ("gram", "plain"):
        folder = RunFolder(runs / f"{name}_{seed}")
        recipe = chain(arguments, seed, gram=name == "gram")
        if shared is not None and not folder.holds_a_run:
            # The first phase is the same to the bit, so it is trained once.
            folder.begin(recipe.model_dump(mode="json"))
            shutil.copytree(shared, folder.path / "phases" / shared.name)
        pretrain(recipe, folder, resume=True, quiet=True)
        parts = [folder.path / "phases" / f"{n}_{phase}" for n, phase in enumerate(PHASES, 1)]
        shared = parts[0]
        for phase, part in zip(PHASES, parts, strict=True):
            backbone = load_backbone(part / "export", device=arguments.device)
            rows.append(exam.row(backbone, name, phase, seed))
    recipe = base_recipe(arguments, seed).changed({"model": STUDENT, "steps": arguments.steps[3]})
    export = pretrain(recipe, RunFolder(runs / f"alone_{seed}"), resume=True, quiet=True)
    alone = load_backbone(export, device=arguments.device)
    return [*rows, exam.row(alone, "alone", "distill", seed)]


@dataclass(frozen=True)
class Exam:
    """Labelled images at one size, and what is asked of a network about them.

    Attributes:
        images: file values as the network reads them, float `(n, 3, side, side)`.
        masks: the middle square of each mask, int64 `(h, w)`.
        labels: class of each image.
        parts: `train` or `test` of each image.
        counted: images whose class is common enough for k-NN.
        bank: number of training images whose patches vote.
    """

    images: Tensor
    masks: list[Tensor]
    labels: np.ndarray
    parts: np.ndarray
    counted: np.ndarray
    bank: int

    @classmethod
    def read(cls, arguments: argparse.Namespace, recipe: PretrainRecipe) -> Exam:
        """The training and the test images of the table."""
        source = load_source(recipe.data)
        table = read_table(arguments.table, needed=("mask", "label", "split"))
        table = [row for row in table if row["split"] in ("train", "test")]
        info = load_backbone(SCRATCH).info
        images, masks = [], []
        for row in table:
            image = to_model(source.read(row["path"]), info)
            images.append(to_square(image, arguments.size, "crop"))
            with Image.open(arguments.table.parent / row["mask"]) as mask:
                masks.append(middle(torch.from_numpy(np.array(mask)).long()))
        labels = np.array([row["label"] for row in table])
        names, counts = np.unique(labels, return_counts=True)
        common = names[counts >= arguments.rarest]
        parts = np.array([row["split"] for row in table])
        counted = np.isin(labels, common)
        return cls(torch.stack(images), masks, labels, parts, counted, arguments.bank)

    def row(self, backbone: FrozenBackbone, chain: str, phase: str, seed: int) -> Row:
        """All numbers of one network; None where features have no pattern at all."""
        patch = backbone.info.patch_size
        grid = (self.images.shape[2] // patch, self.images.shape[3] // patch)
        cls_tokens, patches = self._tokens(backbone, self.images)
        _, mirrored = self._tokens(backbone, self.images.flip(-1))
        mirrored = mirrored.unflatten(1, grid).flip(2).flatten(1, 2)
        test = np.flatnonzero(self.parts == "test")
        agreed = np.array([patch_consistency(patches[at], mirrored[at]) for at in test])
        local = np.array([local_share(patches[at], grid) for at in test])
        vectors = [unit_rows(part.numpy()) for part in (cls_tokens, patches.mean(dim=1))]
        x = np.concatenate(vectors, axis=1)
        asked, known = (self.counted & (self.parts == part) for part in ("test", "train"))
        return {
            "chain": chain,
            "phase": phase,
            "seed": seed,
            "knn": knn(x[known], self.labels[known], x[asked], self.labels[asked]),
            "iou": self._iou(patches, grid, test),
            "consistency": float(agreed.mean()) if np.isfinite(agreed).all() else None,
            "local": float(local.mean()),
        }

    def _tokens(self, backbone: FrozenBackbone, images: Tensor) -> tuple[Tensor, Tensor]:
        found = [backbone(part) for part in images.split(32)]
        class_tokens = torch.cat([features.cls.float().cpu() for features in found])
        return class_tokens, torch.cat([features.patches.float().cpu() for features in found])

    def _iou(self, patches: Tensor, grid: tuple[int, int], test: np.ndarray) -> float:
        """Mean IoU of the test images' patches, labelled by neighbours in training images."""
        train = np.flatnonzero(self.parts == "train")
        # Evenly spread over the table, which is sorted by source.
        train = train[np.linspace(0, len(train) - 1, min(self.bank, len(train))).astype(int)]
        truth = torch.stack([patch_labels(mask, grid) for mask in self.masks])
        classes = int(truth.max()) + 1
        found = segment_by_neighbours(
            patches[train].flatten(0, 1),
            truth[train].flatten(),
            patches[test].flatten(0, 1),
            classes=classes,
        )
        return mean_iou(found.numpy(), truth[test].flatten().numpy(), classes)


def middle(mask: Tensor) -> Tensor:
    """The middle square of a mask `(H, W)`, which is what a network reads of the image."""
    height, width = mask.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return mask[top : top + side, left : left + side]


def tables(rows: Sequence[Row]) -> str:
    """Means over seeds of every network, then differences seed by seed."""
    kinds = dict.fromkeys((row["chain"], row["phase"]) for row in rows)
    lines = [
        [chain, phase, *(mean_cell(values(rows, m, chain=chain, phase=phase)) for m in METRICS)]
        for chain, phase in kinds
    ]
    pairs = [("gram", "plain", phase) for phase in PHASES[1:]]
    pairs += [(chain, "alone", "distill") for chain in ("gram", "plain")]
    gains = []
    for first, second, phase in pairs:
        line = [f"{first} less {second}", phase]
        for metric in METRICS:
            better, other = (values(rows, metric, chain=c, phase=phase) for c in (first, second))
            line.append(paired_cell(better, other))
        gains.append(line)
    header = ["chain", "phase", *METRICS.values()]
    notes = "All numbers in hundredths, with 95 % intervals over seeds."
    return f"{notes}\n\n{markdown(header, lines)}\n\n{markdown(header, gains)}"


if __name__ == "__main__":
    main()

"""Small batches and many prototypes: does anything learn? K as resolved against a fixed large one.

    python benchmarks/small_batch.py --data DIR --labels folder --split DIR/splits.json --out runs/s

One micro ViT from nothing, the same images and steps; batches of 8, 32 and 64 images, each with the
prototypes that `objective.prototypes=auto` settles for it and with 65,536.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from grid import Row, collect, image_parser, markdown, mean_cell, values
from methods import REFERENCE, read
from methods import recipe_of as methods_recipe

from dino_adapters.data import load_source, read_split
from dino_adapters.pretrain import pretrain
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.plans import SCRATCH

UNTRAINED = "untrained"
LARGE = 65_536
ALIVE = 0.1
"""Nats below log K from which on the class-token term has left its dead value."""


def main(words: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and prints the table."""
    reader = image_parser(__doc__ or "")
    reader.add_argument("--steps", type=int, default=300)
    reader.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="to read at")
    reader.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64])
    reader.add_argument("--prototypes", nargs="+", default=["auto", f"{LARGE}"], help="K, or auto")
    arguments = reader.parse_args(words)
    ks = [int(k) if k.isdecimal() else k for k in arguments.prototypes]
    runs = [(batch, k) for batch in arguments.batches for k in ks]
    tasks = {
        f"{batch}_{k}_{seed}": (batch, k, seed)
        for seed in range(arguments.seeds)
        for batch, k in runs
    } | {f"{UNTRAINED}_{seed}": (0, UNTRAINED, seed) for seed in range(arguments.seeds)}
    text = table(collect(measured, tasks, arguments), runs)
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def recipe_of(
    arguments: argparse.Namespace, batch: int, prototypes: int | str, seed: int
) -> PretrainRecipe:
    """The recipe of one run: that of `methods.py`, with another batch and other prototypes."""
    return methods_recipe(arguments, REFERENCE, seed).changed(
        {
            "optim": {"batch_size": batch},
            "objective": {"prototypes": prototypes},
            "monitor": {"every": 0.5, "images": 256},
        }
    )


def measured(
    arguments: argparse.Namespace, batch: int, prototypes: int | str, seed: int
) -> list[Row]:
    """Trains one network, or takes an untrained one, and measures it."""
    row: Row = {"batch": batch, "prototypes": prototypes, "seed": seed}
    trained = prototypes != UNTRAINED
    recipe = recipe_of(arguments, batch or 8, prototypes if trained else "auto", seed)
    source = load_source(recipe.data)
    split = read_split(arguments.split, keys=source.keys)
    export: Path | str = SCRATCH
    run = f"{batch}_{prototypes}_{seed}"
    if trained:
        folder = RunFolder(arguments.out / "runs" / run)
        export = pretrain(recipe, folder, resume=True, quiet=True)
        look, last = folder.rows_with("watch/rankme")[-1], folder.rows_with("loss")[-25:]
        loss = sum(step["dino_global"] for step in last) / len(last)
        settled = PretrainRecipe.model_validate_json(folder.recipe_file.read_text())
        k = settled.objective.prototypes
        row |= {"k": k, "loss": loss, "below": math.log(k) - loss}
        row |= {sign: look[f"watch/{sign}"] for sign in ("rankme", "prototypes_used")}
        row |= {"effective": math.exp(look["watch/marginal_entropy"])}
    features = arguments.out / "features" / run
    return [row | read(arguments, export, features, source, split, seed)]


def table(rows: Sequence[Row], runs: Sequence[tuple[int, int | str]]) -> str:
    """A line a run: k-NN, what of the prototypes is in use, and whether the loss is alive."""
    header = ["batch", "K", "k-NN, %", "first choice of an image", "in use, exp(entropy)"]
    header += ["DINO term below log K", "alive"]
    lines = []
    for batch, prototypes in runs:
        own = [r for r in rows if r["batch"] == batch and r["prototypes"] == prototypes]
        where = {"batch": batch, "prototypes": prototypes}
        below = [row["below"] for row in own]
        used, effective = (
            sum(row[name] for row in own) / len(own) for name in ("prototypes_used", "effective")
        )
        lines.append(
            [
                str(batch),
                f"{own[0]['k']:,}{' (auto)' if prototypes == 'auto' else ''}",
                mean_cell(values(rows, "knn", **where)),
                f"{used:.0f}",
                f"{effective:,.0f}",
                f"{sum(below) / len(below):.2f}",
                "yes" if min(below) > ALIVE else "no",
            ]
        )
    floor = mean_cell(values(rows, "knn", prototypes=UNTRAINED))
    return markdown(header, [*lines, [UNTRAINED, "", floor, "", "", "", ""]])


if __name__ == "__main__":
    main()

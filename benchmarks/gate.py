"""Continued pretraining against its own start: naive, ours, with adapters, from nothing.

    python benchmarks/gate.py --start SOURCE --data DIR --labels folder --split DIR/splits.json
        --out runs/gate

Every variant trains on the training part without labels and with the gate on, which may use labels
of the parts `train` and `val`. The test part, which nothing was chosen on, then says whether the
gate was right: the start is read at its best size, the result there as well unless another is shown
to suit it better (both on `train`), and they are compared image by image, by k-NN and linear probe
on all labels of `train`, and by nearest class mean on few.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grid import Row, collect, image_parser, markdown, mean_cell, paired_cell, values

from dino_adapters.backbones import build_network
from dino_adapters.data import Split, load_source, read_split
from dino_adapters.pretrain import pretrain
from dino_adapters.pretrain.gate import judge
from dino_adapters.pretrain.labelled import LabelledSet, Squares
from dino_adapters.pretrain.probe import Look, look, read
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.read import read_recipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import write_json
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study.fewshot import evaluate_shots

RECIPES = Path(__file__).parents[1] / "pretrain"
STOCK: dict[str, Any] = {
    "crops": {
        "jitter": 0.8,
        "grayscale": 0.2,
        "blur": (0.0, 0.9, 0.5),
        "blur_sigma": (0.1, 2.0),
        "solarize": 0.2,
    },
    "optim": {"lr": 1e-3, "lr_rule": "none", "layer_decay": 1.0},
    "schedule": {
        "warmup": 0.0,
        "freeze_backbone": 0.0,
        "backbone_ramp": 0.0,
        "momentum": (0.992, 1.0),
        "momentum_span": 0.0,
    },
    "anchor": None,
    "gram": None,
    "monitor": {"on_collapse": "warn"},
}
"""The reference's rate unscaled, its views and momentum at once, on a backbone from elsewhere."""
VARIANTS = ("naive", "ours", "lora", "scratch")
NAMES = {"knn": "k-NN", "linear": "linear probe"}
SHOTS = (1, 5, 10)
FEW = {f"shot_{shot}": f"{shot}-shot" for shot in SHOTS}
DRAWS = 20


def main(words: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and prints the table."""
    reader = image_parser(__doc__ or "")
    reader.add_argument("--start", required=True, help="anything that load_backbone opens")
    reader.add_argument("--checkpoint", help="weights file for a name of timm")
    reader.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    reader.add_argument("--set", nargs="+", default=[], help="key=value for every variant")
    arguments = reader.parse_args(words)
    tasks = {
        f"{name}_{seed}": (name, seed)
        for seed in range(arguments.seeds)
        for name in arguments.variants
    }
    rows = collect(measured, tasks, arguments)
    text = f"{table(rows)}\n\n{few_table(rows)}"
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def recipe_of(arguments: argparse.Namespace, name: str, seed: int) -> PretrainRecipe:
    """The recipe of one run."""
    file = RECIPES / ("continue_lora.py" if name == "lora" else "continue.py")
    told = [f"data.source={arguments.data}", f"split={arguments.split}", f"seed={seed}"]
    told += ["data.workers=1", f"device={arguments.device}", f"optim.batch_size={arguments.batch}"]
    told += [f"model.source={arguments.start}"]
    if arguments.labels:
        told.append(f"data.labels={arguments.labels}")
    if arguments.checkpoint and name != "scratch":
        told.append(f"model.checkpoint={arguments.checkpoint}")
    recipe = read_recipe(str(file), PretrainRecipe, [*told, *arguments.set])
    if name == "naive":
        return recipe.changed(STOCK)
    if name == "scratch":
        return recipe.changed(fresh(arguments) | {"anchor": None, "gram": None})
    return recipe


def fresh(arguments: argparse.Namespace) -> dict[str, Any]:
    """The start's architecture with random weights, and a schedule for it."""
    _, info = build_network(arguments.start, checkpoint=arguments.checkpoint)
    model: dict[str, Any] = {"source": info.name, "checkpoint": None}
    if info.family != "timm":
        model["architecture"] = {k: v for k, v in info.architecture.items() if k != "in_channels"}
    return {
        "model": model,
        "schedule": {"freeze_backbone": 0.0, "backbone_ramp": 0.0},
        "optim": {"layer_decay": 1.0},
    }


def measured(arguments: argparse.Namespace, name: str, seed: int) -> list[Row]:
    """Trains one network and holds it against the start on the test part."""
    recipe, began = recipe_of(arguments, name, seed), time.monotonic()
    folder = RunFolder(arguments.out / "runs" / f"{name}_{seed}")
    pretrain(recipe, folder, resume=True, quiet=True)
    seconds = time.monotonic() - began
    exam, sizes = examination(recipe), sizes_of(folder, recipe)
    start = start_of(arguments, exam, sizes)
    continued = folder.path / "candidates" / "continued"
    result = examined(continued, None, exam, sizes, usual=start.size)
    gate = json.loads((folder.path / "gate.json").read_text(encoding="utf-8"))
    truth = judge(start, result, exam)
    row: Row = {"variant": name, "seed": seed, "seconds": round(seconds, 1)}
    row |= {"start_knn": start.knn, "start_linear": start.linear, "start_size": start.size}
    row |= {"knn": result.knn, "linear": result.linear, "size": result.size}
    row |= {"gain": truth.difference, "low": truth.low, "high": truth.high, "truth": truth.kind}
    row |= {"gate": gate["kind"], "exported": gate["exported"], "sentence": gate["sentence"]}
    row["exported_gain"] = truth.difference if gate["exported"] == "continued" else 0.0
    networks = {
        "start": (arguments.start, arguments.checkpoint, start.size),
        "now": (continued, None, result.size),
    }
    return [row | few_labels(networks, exam)]


def sizes_of(folder: RunFolder, recipe: PretrainRecipe) -> tuple[int, ...]:
    """Sizes that the gate read at, and that are read at here as well.

    That of the crops where the gate had too few labels to read anything.
    """
    path = folder.path / "candidates" / "start.json"
    if not path.exists():
        return (recipe.crops.global_size,)
    return tuple(int(size) for size in json.loads(path.read_text(encoding="utf-8"))["scores"])


def examination(recipe: PretrainRecipe) -> LabelledSet:
    """The training part to learn from and to choose by, the test part to answer for."""
    notices = Notices()
    source = load_source(recipe.data, notices=notices)
    assert recipe.split is not None
    split = read_split(Path(recipe.split), keys=source.keys)
    gallery = tuple(key for key in split.train if key in source.labels)
    known = {source.labels[key] for key in gallery}
    queries = tuple(k for k in split.test if k in source.labels and source.labels[k] in known)
    groups = {**source.groups, **split.groups}
    return LabelledSet(
        source,
        gallery,
        queries,
        {key: source.labels[key] for key in (*gallery, *queries)},
        {key: groups.get(key, key) for key in (*gallery, *queries)},
        seen=False,
        squares=Squares(source, notices),
        workers=1,
        max_unreadable=0.1,
        notices=notices,
    )


def start_of(arguments: argparse.Namespace, exam: LabelledSet, sizes: Sequence[int]) -> Look:
    """What the test part says of the start, which is the same for all runs."""
    path = arguments.out / f"start_{'_'.join(map(str, sizes))}.json"
    if path.exists():
        held = Look.from_json(json.loads(path.read_text(encoding="utf-8")))
        if held.labelled == exam.digest and tuple(held.scores) == tuple(sizes):
            return held
    found = examined(arguments.start, arguments.checkpoint, exam, sizes)
    write_json(path, found.as_json())
    return found


def examined(
    source: Path | str,
    checkpoint: str | None,
    exam: LabelledSet,
    sizes: Sequence[int],
    usual: int | None = None,
) -> Look:
    """What the test part says of a network."""
    network, info = build_network(source, checkpoint=checkpoint)
    return look(network.eval(), info, exam, sizes, usual=usual)


def few_labels(networks: dict[str, tuple[Path | str, str | None, int]], exam: LabelledSet) -> Row:
    """Few-shot accuracy of start and result, each at its size, on the same draws."""
    keys = (*exam.gallery, *exam.queries)
    vectors = {}
    for name, (source, checkpoint, size) in networks.items():
        network, info = build_network(source, checkpoint=checkpoint)
        found = read(network.eval(), info, exam, keys, (size,))
        assert found.keys == keys, "a benchmark needs every image"
        vectors[name] = found.vectors[size]
    split = Split(exam.gallery, (), exam.queries, seed=None, rule="as given", groups=exam.groups)
    few = evaluate_shots(vectors, keys, exam.labels, exam.groups, split, shots=SHOTS, draws=DRAWS)
    row: Row = {}
    for shot in SHOTS:
        row[f"start_shot_{shot}"], row[f"shot_{shot}"] = (
            few.interval(name, shot)[0] for name in ("start", "now")
        )
    return row


def table(rows: Sequence[Row]) -> str:
    """A line a variant: means over seeds, differences on the test part, and the gate's word."""
    header, (start, *lines) = compared(rows, NAMES)
    header += [
        "both less start, each seed (95 % interval over test images)",
        "gate said",
        "export",
    ]
    start += [""] * 3
    for line in lines:
        own = [row for row in rows if row["variant"] == line[0]]
        line.append("; ".join(span(row["gain"], row["low"], row["high"]) for row in own))
        # A network from nothing is gated against its own random start, which says nothing here.
        gated = [] if line[0] == "scratch" else own
        line.append("; ".join(f"{row['gate']}" for row in gated))
        line.append("; ".join(f"{row['exported']}" for row in gated))
    return markdown(header, [start, *lines])


def few_table(rows: Sequence[Row]) -> str:
    """A line a variant: nearest class mean on few labels, and what continuing changed in it."""
    return markdown(*compared(rows, FEW))


def compared(rows: Sequence[Row], names: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """A header, a line for the start and one a variant: two cells for each named metric."""
    header, start = ["variant"], ["start, frozen"]
    for metric, title in names.items():
        header += [f"{title}, %", "less start"]
        start += [f"{100 * rows[0][f'start_{metric}']:.1f}", ""]
    lines = [start]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        line = [name]
        for metric in names:
            now, before = values(own, metric), values(own, f"start_{metric}")
            line += [mean_cell(now), paired_cell(now, before)]
        lines.append(line)
    return header, lines


def span(gain: float, low: float | None, high: float | None) -> str:
    """A difference with its interval, in hundredths."""
    if low is None or high is None:  # too few groups of images, or too few answered otherwise
        return f"{100 * gain:+.1f}"
    return f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main()

"""What the scripts of this folder share: runs kept and skipped, and tables of intervals."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_adapters.contracts import RunFolderError
from dino_adapters.heads import WeightedKNN
from dino_adapters.measure import balanced_accuracy, mean_interval, paired_interval
from dino_adapters.runtime.files import write_json

Row = dict[str, Any]
FEW_IMAGES: dict[str, dict[str, Any]] = {
    "objective": {
        "prototypes": 256,
        "hidden_dim": 256,
        "bottleneck_dim": 64,
        "prototype_norm": 1.0,
        "teacher_temperature": (0.04, 0.04),
    },
    "optim": {"lr": 1e-3},
}
"""Settings with which a micro ViT learns something in hundreds of steps on hundreds of images."""
NOT_SETTINGS = ("out", "seeds", "jobs", "variants", "batches", "prototypes")
"""Arguments that say which runs are made, and not what a run is."""


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all scripts have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, required=True, help="runs and results; resumed")
    made.add_argument("--seeds", type=int, default=3, help="seeds 0 to this less one")
    made.add_argument("--batch", type=int, default=32, help="images of a step")
    made.add_argument("--jobs", type=int, default=1, help="processes, each of one thread")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return made


def image_parser(description: str) -> argparse.ArgumentParser:
    """The same, and those of a set of labelled images with a split; the description as it is."""
    made = parser(description)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--data", required=True, help="folder, pattern or CSV of the images")
    made.add_argument("--labels", help="CSV, or `folder`; not needed for a CSV with labels")
    made.add_argument("--split", type=Path, required=True, help="JSON or CSV with its parts")
    return made


def collect(
    job: Callable[..., list[Row]],
    tasks: Mapping[str, tuple[Any, ...]],
    arguments: argparse.Namespace,
) -> list[Row]:
    """Rows of all tasks; those that were finished earlier are read from the folder.

    Args:
        job: a function of a module, called with the arguments and those of the task.
        tasks: by name, what the job is called with.
        arguments: of the command line; `out` keeps a file for each finished task.

    Raises:
        RunFolderError: the folder holds results of other settings.
    """
    settings = {k: v for k, v in vars(arguments).items() if k not in NOT_SETTINGS}
    settings = json.loads(json.dumps(settings, default=str))
    note = arguments.out / "settings.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != settings:
        raise RunFolderError(
            f"{arguments.out} holds results of other settings ({note.name}). Name another folder "
            "with --out, or give the same ones."
        )
    write_json(note, settings)
    done = {name: arguments.out / "done" / f"{name}.json" for name in tasks}
    todo = [name for name in tasks if not done[name].exists()]
    if arguments.jobs == 1:
        for name in todo:
            _finish(job, arguments, tasks[name], done[name])
    elif todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, context) as pool:
            futures = [
                pool.submit(_finish, job, arguments, tasks[name], done[name]) for name in todo
            ]
            for future in futures:
                future.result()
    rows = [row for path in done.values() for row in json.loads(path.read_text(encoding="utf-8"))]
    write_json(arguments.out / "rows.json", rows)
    return rows


def _finish(
    job: Callable[..., list[Row]],
    arguments: argparse.Namespace,
    task: tuple[Any, ...],
    path: Path,
) -> None:
    torch.set_num_threads(1)
    rows = job(arguments, *task)
    write_json(path, rows)
    print(f"done: {path.stem}", flush=True)


def knn(
    vectors: np.ndarray,
    labels: np.ndarray,
    test_vectors: np.ndarray,
    test_labels: np.ndarray,
) -> float:
    """Balanced accuracy of k-NN (k = 10): gallery `(n, D)`, queries `(m, D)`, 0 to 1."""
    head = WeightedKNN().fit(vectors, labels)
    return balanced_accuracy(test_labels, np.asarray(head.predict(test_vectors)))


def values(rows: Sequence[Row], metric: str, **where: Any) -> dict[int, float]:
    """Seed -> number, of the rows in which these entries have these values."""
    found = {
        row["seed"]: row[metric]
        for row in rows
        if row.get(metric) is not None and all(row.get(k) == v for k, v in where.items())
    }
    return dict(sorted(found.items()))


def mean_cell(found: Mapping[int, float]) -> str:
    """Mean and 95 % interval over seeds, in hundredths."""
    if not found:
        return "-"
    return _cell(*mean_interval(list(found.values())), count=len(found))


def paired_cell(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    """Mean of first - second and its 95 % interval over the seeds of both, in hundredths."""
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return "-"
    pairs = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    return _cell(*paired_interval(*pairs), count=len(seeds), sign="+")


def _cell(mean: float, low: float, high: float, *, count: int, sign: str = "") -> str:
    centre = f"{100 * mean:{sign}.1f}"
    # A single seed, or a floor that no seed moves.
    if count < 2 or high - low < 1e-9:
        return centre
    return f"{centre} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

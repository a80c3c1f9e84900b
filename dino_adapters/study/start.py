"""The main job in one call: pretrain, export, embed, compare with few labels, report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dino_adapters.backbones import load_backbone
from dino_adapters.contracts import Report, RunFolderError
from dino_adapters.data.demo_tiles import make_tiles
from dino_adapters.data.splits import write_split
from dino_adapters.features.baselines import image_statistics, raw_pixels
from dino_adapters.runtime.console import Notices, duration
from dino_adapters.runtime.files import write_json
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.study import start_page
from dino_adapters.study.fewshot import evaluate_shots
from dino_adapters.study.page import write_page
from dino_adapters.study.reading import (
    Bench,
    Reading,
    at_most,
    candidate_sizes,
    keep_readable,
    read_at_best_size,
)
from dino_adapters.study.setting import Setting, gather
from dino_adapters.study.shot_table import FewShotTable
from dino_adapters.study.trained import (
    Names,
    Trained,
    named_after,
    networks_before,
    train_both,
)

LOGGER = logging.getLogger(__name__)
TILES, SPLIT = "photographs", "split.json"
DEMO_WEIGHTS = "demo:efficientnet_lite0"
DRAWS = 20


def start(
    data: Path | None,
    labels: str | Path | None,
    weights: str | None,
    out: Path,
    *,
    minutes: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
    shots: Sequence[int] = (1, 3, 5),
    bands: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Report:
    """Trains without labels on images, and says with few labels whether that helped.

    Two runs, a micro ViT from nothing and a given network continued, are compared with the same
    networks before, and with plain pixels and image statistics. An interrupted call goes on where
    it stopped.

    Args:
        data: folder, pattern or table of images; None takes example photographs (extra `demo`).
        labels: CSV with `path` and `label`, or `folder`; None takes folder names if there are any.
        weights: network to continue; None takes the public one of the extra `demo`.
        out: folder for everything.
        minutes: training time of both runs together; None takes a fixed number of steps.
        seed: of everything.
        overwrite: replace a finished run in `out`.
        quiet: no progress display.
        shots: labelled images of a class.
        bands: names of the files' channels; needed for anything but grey or RGB.
        value_range: file values that mean 0 and 1; needed for 16-bit and float images.

    Returns:
        What stands in `out/report/index.html`.

    Raises:
        RunFolderError: `out` holds a finished run, or one that was told something else.
        DataError, WeightsError, MissingLibraryError: before anything is trained.
    """
    began = time.monotonic()
    folder = RunFolder(out)
    told: dict[str, Any] = {
        "data": None if data is None else str(data),
        "labels": None if labels is None else str(labels),
        "weights": weights or DEMO_WEIGHTS,
        "minutes": minutes,
        "seed": seed,
        "shots": list(shots),
        "bands": None if bands is None else list(bands),
        "value_range": None if value_range is None else list(value_range),
    }
    with folder.lock():
        going_on = refuse_other_runs(folder, told, overwrite=overwrite)
        notices = Notices()
        names = Names() if weights is None else named_after(weights)
        if data is None and not going_on:  # example images: nothing of the user's to refuse
            begin(folder, told, overwrite=overwrite)
        where = make_tiles(out / TILES) if data is None else data
        setting = gather(
            where,
            where / "labels.csv" if data is None else labels,
            out / SPLIT,
            bands=bands,
            value_range=value_range,
            seed=seed,
            notices=notices,
        )
        before = networks_before(setting, told["weights"], names, seed, notices)
        if data is not None and not going_on:
            begin(folder, told, overwrite=overwrite)
        if setting.split is not None:
            write_split(out / SPLIT, setting.split)
        LOGGER.info("%s", setting.words)
        trained = train_both(setting, before, folder, told, names, notices, quiet=quiet)
        page = start_page.Page(setting, names, trained.runs, told, notices, trained.networks())
        if setting.split is not None:
            page = measure(page, trained, setting, names, out, seed, tuple(shots), quiet=quiet)
        report = page.report(seconds=time.monotonic() - began)
        write_page(report, folder.report / "index.html")
        LOGGER.info("all done in %s", duration(time.monotonic() - began))
        return report


def refuse_other_runs(folder: RunFolder, told: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether an interrupted run of the same job stands in the folder, to go on with.

    Raises:
        RunFolderError: another run, or a finished one, and it may not be replaced.
    """
    if overwrite or not folder.holds_a_run:
        return False
    before = json.loads(folder.recipe_file.read_text(encoding="utf-8"))
    if (folder.report / "index.html").exists() or before != told:
        raise RunFolderError(
            f"{folder.path} already holds a run{'' if before == told else ' with other settings'}. "
            "Name another folder with --out, or replace it with --overwrite."
        )
    LOGGER.info("going on with the run in %s", folder.path)
    return True


def begin(folder: RunFolder, told: dict[str, Any], *, overwrite: bool) -> None:
    """Takes the folder for this job."""
    if overwrite:
        folder.empty()
    folder.begin(told)


def measure(
    page: start_page.Page,
    trained: Trained,
    setting: Setting,
    names: Names,
    out: Path,
    seed: int,
    shots: tuple[int, ...],
    *,
    quiet: bool,
) -> start_page.Page:
    """Reads every network at its best size and compares all rows on the same draws."""
    assert setting.split is not None
    source = setting.source
    split = at_most(setting.split, source.labels, seed)
    bench = Bench(source, split, out / "features", seed, shots, quiet, page.notices)
    readings: dict[str, Reading] = {}
    pairs = ((names.untrained, names.scratch), (names.frozen, names.continued))
    for pair in pairs:
        infos = [page.networks[name].info for name in pair]
        # Random weights were made for no size.
        trained_at = [info.size for info in infos if info.training.get("weights") != "random"]
        sizes = candidate_sizes(infos[1].patch_size, trained_at, setting.side)
        for name in pair:
            readings[name] = read_at_best_size(name, page.networks[name], bench, sizes)
    readable = set.intersection(*(set(reading.store.keys) for reading in readings.values()))
    bench = replace(bench, split=keep_readable(split, readable))
    rows: dict[str, np.ndarray] = {
        names.pixels: raw_pixels(source, bench.keys),
        names.statistics: image_statistics(source, bench.keys),
    }
    rows |= {name: readings[name].vectors(bench.keys) for pair in pairs for name in pair}
    table = few_shots(rows, bench, standardised=(names.statistics,))
    table.save(out / "few_shots.json")
    gains = [table.paired(after, before) for before, after in pairs]
    write_json(out / "gains.json", [gain.as_json() for gain in gains])
    curves = {
        after: over_time(trained, readings[before], readings[after], bench)
        for before, after in pairs
    }
    write_json(
        out / "curves.json", {name: [list(p) for p in curve] for name, curve in curves.items()}
    )
    return page.with_results(table, gains, readings, curves, bench)


def few_shots(
    rows: dict[str, np.ndarray], bench: Bench, *, standardised: Sequence[str] = ()
) -> FewShotTable:
    """All rows on the same draws of labelled images."""
    return evaluate_shots(
        rows,
        bench.keys,
        bench.source.labels,
        bench.groups,
        bench.split,
        shots=bench.shots,
        draws=DRAWS,
        seed=bench.seed,
        standardised=standardised,
    )


def over_time(
    trained: Trained, before: Reading, after: Reading, bench: Bench
) -> list[tuple[float, float, float, float]]:
    """`(seconds, mean, low, high)` of the largest shot count, for start, snapshots and end.

    The start is read at its own best size, the others at the best size of the end.
    """
    run = trained.runs[after.name]
    moments = [(0.0, before.vectors(bench.keys))]
    for folder in sorted((run.path / "snapshots").glob("step_*")):
        backbone = load_backbone(folder, device=trained.device)
        store = bench.embed(backbone, after.size, bench.keys)
        at = float(backbone.info.training["seconds"])
        moments.append((at, Reading("", backbone, after.size, {}, store).vectors(bench.keys)))
    moments.append((float(run.rows_with("loss")[-1]["seconds"]), after.vectors(bench.keys)))
    table = few_shots({f"{at}": rows for at, rows in moments}, bench)
    shot = max(bench.shots)
    return [(at, *table.interval(f"{at}", shot)) for at, _ in moments]

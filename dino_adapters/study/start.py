"""The main job in one call: pretrain, export, embed, compare with few labels, report."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dino_adapters.backbones import FrozenBackbone, load_backbone
from dino_adapters.contracts import RGB, Band, Report, RunFolderError
from dino_adapters.data.splits import Split
from dino_adapters.features.baselines import image_statistics, raw_pixels
from dino_adapters.pretrain import pretrain
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.console import Notices, duration
from dino_adapters.runtime.files import write_json
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import pick_device
from dino_adapters.study import start_page
from dino_adapters.study.fewshot import evaluate_shots
from dino_adapters.study.page import write_page
from dino_adapters.study.plans import (
    CONTINUE_STEPS,
    SCRATCH,
    SCRATCH_STEPS,
    continue_plan,
    scratch_plan,
)
from dino_adapters.study.reading import Bench, Reading, at_most, candidate_sizes, read_at_best_size
from dino_adapters.study.setting import Setting, gather
from dino_adapters.study.shot_table import FewShotTable

LOGGER = logging.getLogger(__name__)
DEMO_WEIGHTS = "demo:efficientnet_lite0"
SCRATCH_SHARE = 0.25
PROBE_STEPS = 4
DRAWS = 20


@dataclass(frozen=True)
class Names:
    """Rows of the table."""

    pixels: str = "raw pixels"
    statistics: str = "image statistics"
    untrained: str = "micro ViT, untrained"
    scratch: str = "micro ViT, from nothing"
    frozen: str = "public network, frozen"
    continued: str = "public network, continued"


@dataclass(frozen=True)
class Trained:
    """Both runs, and the networks before and after them."""

    before: dict[str, FrozenBackbone]
    runs: dict[str, RunFolder]
    device: str

    def after(self, name: str) -> FrozenBackbone:
        """The exported teacher of a run."""
        return load_backbone(self.runs[name].export, device=self.device)


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
    told = {
        "data": None if data is None else str(data),
        "labels": None if labels is None else str(labels),
        "weights": weights or DEMO_WEIGHTS,
        "minutes": minutes,
        "seed": seed,
        "shots": list(shots),
        "bands": None if bands is None else list(bands),
        "value_range": None if value_range is None else list(value_range),
    }
    with claim(folder, told, overwrite=overwrite):
        names = Names() if weights is None else named_after(weights)
        notices = Notices()
        setting = gather(
            data,
            labels,
            out,
            bands=bands,
            value_range=value_range,
            seed=seed,
            notices=notices,
        )
        LOGGER.info("%s", setting.words)
        trained = train_both(setting, told["weights"], folder, names, minutes, seed, quiet=quiet)
        networks = {}  # each network beside what became of it
        for before, after in zip(trained.before, trained.runs, strict=True):
            networks |= {before: trained.before[before], after: trained.after(after)}
        page = start_page.Page(setting, names, trained.runs, told, notices, networks)
        if setting.split is not None:
            page = measure(page, trained, setting, names, out, seed, tuple(shots), quiet=quiet)
        report = page.report(seconds=time.monotonic() - began)
        write_page(report, folder.report / "index.html")
        LOGGER.info("all done in %s", duration(time.monotonic() - began))
        return report


@contextlib.contextmanager
def claim(folder: RunFolder, told: dict[str, object], *, overwrite: bool) -> Iterator[None]:
    """Holds the folder: a new one, or one where the same job was interrupted.

    Raises:
        RunFolderError: it holds something else, or another process writes there.
    """
    if overwrite:
        folder.clear()
    with folder.lock():
        if folder.holds_a_run:
            before = json.loads(folder.recipe_file.read_text(encoding="utf-8"))
            if (folder.report / "index.html").exists() or before != told:
                raise RunFolderError(
                    f"{folder.path} already holds a run"
                    f"{'' if before == told else ' with other settings'}. Name another folder with "
                    "--out, or replace it with --overwrite."
                )
            LOGGER.info("going on with the run in %s", folder.path)
        else:
            folder.begin(told)
        yield


def named_after(weights: str) -> Names:
    """Rows that carry the name of the user's own start weights."""
    name = Path(weights).name
    return Names(frozen=f"{name}, frozen", continued=f"{name}, continued")


def train_both(
    setting: Setting,
    weights: str,
    folder: RunFolder,
    names: Names,
    minutes: float | None,
    seed: int,
    *,
    quiet: bool,
) -> Trained:
    """Runs both plans; a run that is finished already is taken as it is."""
    device = str(pick_device())
    start_seed = derive(seed, "network")
    before = {
        names.untrained: load_backbone(
            SCRATCH, bands=setting.bands, seed=start_seed, device=device
        ),
        names.frozen: load_backbone(weights, bands=bands_of_frozen(setting), device=device),
    }
    side = setting.side
    images, split = setting.training, setting.split_file
    scratch = scratch_plan(images, split, side=side, steps=SCRATCH_STEPS, seed=seed)
    continued = continue_plan(
        images,
        split,
        weights,
        before[names.frozen].info,
        side=side,
        steps=CONTINUE_STEPS,
        seed=seed,
    )
    shares = {"scratch": SCRATCH_SHARE, "continued": 1 - SCRATCH_SHARE}
    runs = {}
    for name, plan in (("scratch", scratch), ("continued", continued)):
        run = RunFolder(folder.path / name)
        if minutes is not None:
            plan = fit_to_time(plan, run, 60 * minutes * shares[name])
        if not (run.export / "card.json").exists():
            LOGGER.info("training: %s", getattr(names, name))
            pretrain(plan, run, resume=True, quiet=quiet)
        runs[getattr(names, name)] = run
    return Trained(before, runs, device)


def bands_of_frozen(setting: Setting) -> tuple[Band, ...] | None:
    """The bands a frozen network reads: its own where the images have them (None), else all.

    Spread filters that were never trained cost accuracy, so they are the last resort.
    """
    there = {band.name for band in setting.bands}
    is_photo = there == {"grey"} or {band.name for band in RGB} <= there
    return None if is_photo else setting.bands


def fit_to_time(plan: PretrainRecipe, run: RunFolder, seconds: float) -> PretrainRecipe:
    """The plan with as many steps as fit into the time, by a short probe; asked once per run."""
    if run.holds_a_run:
        steps = json.loads(run.recipe_file.read_text(encoding="utf-8"))["steps"]
        return plan.model_copy(update={"steps": steps})
    probe = RunFolder(run.path.with_name(f".{run.path.name}.probe"))
    shutil.rmtree(probe.path, ignore_errors=True)
    pretrain(plan.model_copy(update={"steps": PROBE_STEPS}), probe, quiet=True)
    rows = probe.rows()
    each = (rows[-1]["seconds"] - rows[0]["seconds"]) / (PROBE_STEPS - 1)
    shutil.rmtree(probe.path)
    steps = max(PROBE_STEPS, int(seconds / each))
    LOGGER.info("a step takes %.2f s: %d steps fit into %s", each, steps, duration(seconds))
    return plan.model_copy(update={"steps": steps})


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
    for before, after in pairs:
        network = page.networks[after]
        sizes = candidate_sizes(network.info.patch_size, network.info.size, setting.side)
        readings[before] = read_at_best_size(before, page.networks[before], bench, sizes)
        readings[after] = read_at_best_size(after, network, bench, sizes)
    readable = set.intersection(*(set(reading.store.keys) for reading in readings.values()))
    split = keep_readable(split, readable)
    bench = Bench(source, split, bench.folder, seed, shots, quiet, page.notices)
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
    return page.with_results(table, gains, readings, curves, bench)


def keep_readable(split: Split, readable: set[str]) -> Split:
    """The split without images that could not be read; those were counted and named."""
    train, val, test = (
        tuple(key for key in part if key in readable)
        for part in (split.train, split.val, split.test)
    )
    return replace(split, train=train, val=val, test=test, digest="")


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
    moments.append((float(run.rows()[-1]["seconds"]), after.vectors(bench.keys)))
    table = few_shots({f"{at}": rows for at, rows in moments}, bench)
    shot = max(bench.shots)
    return [(at, *table.interval(f"{at}", shot)) for at, _ in moments]

"""start, pretrain, export: from images to a backbone of your own."""

from __future__ import annotations

import os
from json import loads as read_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_adapters.cli import screen
from dino_adapters.cli.options import (
    Bands,
    Checkpoint,
    Json,
    Labels,
    Out,
    Overrides,
    Overwrite,
    Quiet,
    Shots,
    ValueRange,
    band_names,
    low_and_high,
    recipe_and_overrides,
    shot_counts,
)

if TYPE_CHECKING:
    from dino_adapters.recipes.pretrain import PretrainRecipe
    from dino_adapters.runtime.runfolder import RunFolder


def start(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Your images: a folder or a CSV. Without it, example images are used.",
            show_default=False,
        ),
    ] = None,
    labels: Labels = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Network to continue from: anything that load_backbone opens. Without it, a small "
            "public one.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where everything goes.")
    ] = Path("runs/start"),
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time to train, both runs together; measuring comes on top. Default: fixed steps, "
            "about 5 minutes on 2 cores.",
            show_default=False,
            min=0.01,
        ),
    ] = None,
    shots: Shots = "1,3,5",
    bands: Bands = None,
    value_range: ValueRange = None,
    seed: Annotated[int, typer.Option(help="Same seed, same result.", min=0)] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Images in, an answer out: does pretraining on these images help with few labels?

    Trains a small network from nothing and continues a public one, both without labels; compares
    them with simple floors on a few labelled images a class; and writes a report.

    Example: `dino-adapters start --data photos --labels labels.csv --out runs/photos`
    """
    from dino_adapters.runtime.runfolder import RunFolder

    screen.start_messages(quiet=quiet or json, folder=RunFolder(out), afresh=overwrite)
    from dino_adapters.study.start import start as whole_way

    report = whole_way(
        data,
        labels,
        weights,
        out,
        minutes=minutes,
        seed=seed,
        overwrite=overwrite,
        quiet=quiet or json,
        shots=shot_counts(shots),
        bands=band_names(bands),
        value_range=low_and_high(value_range),
    )
    page = out / "report" / "index.html"
    if json:
        screen.as_json({"report": str(page), **screen.report_as_json(report)})
        return
    for table in report.tables[:1]:
        screen.show(table)
    screen.say(*report.notes, *report.summary, f"The report: {page}")


def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe file (.py, .yaml, .json). A .py recipe is code: run only those you trust.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the run lives.", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last good state of the run in --out, or start it if there is "
            "none: the same command for a job that is queued again.",
        ),
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="With --resume: go on although settings have changed."
        ),
    ] = False,
    overwrite: Overwrite = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Train nothing: say what the recipe comes to for these images, and what memory "
            "and time it takes here, by a short trial.",
        ),
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="FOLDER",
            help="Train nothing: compute a step again that was left out as it was not finite.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a network without labels on your own images, and export its backbone.

    Examples:
    `dino-adapters pretrain pretrain/smoke.py data.source=photos --out runs/a`

    `dino-adapters pretrain pretrain/smoke.py data.source=photos --out runs/a --resume`

    `dino-adapters pretrain pretrain/smoke.py data.source=photos --plan`

    On several GPUs: `torchrun --nproc-per-node 4 --no-python dino-adapters pretrain …`
    """
    from dino_adapters.contracts import RecipeError
    from dino_adapters.recipes.pretrain import PretrainRecipe
    from dino_adapters.recipes.read import read_recipe
    from dino_adapters.runtime.runfolder import RunFolder

    if replay is not None:
        show_replay(replay, json=json, quiet=quiet)
        return
    if recipe is None:
        raise RecipeError("No recipe was given. Name one, such as pretrain/smoke.py.")
    path, words = recipe_and_overrides(recipe, overrides)
    settings = read_recipe(path, PretrainRecipe, words)
    if plan:
        show_plan(settings, json=json, quiet=quiet)
        return
    if out is None:
        raise RecipeError("No folder was given for the run. Add --out FOLDER.")
    if resume and overwrite:
        raise RecipeError("--resume goes on with a run and --overwrite removes it. Give one.")
    if accept_changes and not resume:
        raise RecipeError("--accept-changes belongs to --resume. Add that, or leave it out.")
    folder = RunFolder(out)
    leads = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not leads
    screen.start_messages(quiet=quiet or json, folder=folder if leads else None, afresh=overwrite)
    from dino_adapters.pretrain import pretrain as train

    exported = train(
        settings,
        folder,
        resume=resume,
        overwrite=overwrite,
        accept_changes=accept_changes,
        overrides=words,
        quiet=quiet or json,
    )
    if leads:
        show_pretrained(folder, exported, json=json, quiet=quiet)


def show_pretrained(folder: RunFolder, exported: Path, *, json: bool, quiet: bool) -> None:
    """Where the result is, what the gate said, and what to do with it."""
    from dino_adapters.pretrain.gate import GATE, NAMES

    rows = [folder, *folder.phases.values()][-1].rows_with("loss")
    gate = folder.path / GATE
    verdict = read_json(gate.read_text(encoding="utf-8")) if gate.exists() else None
    if json:
        found = {"run": str(folder.path), "export": str(exported)}
        screen.as_json(found | {"last": rows[-1] if rows else {}, "verdict": verdict})
        return
    kind = NAMES[verdict["exported"]] if verdict else "a frozen backbone"
    exports = sorted(card.parent for card in exported.rglob("card.json"))
    screen.say(
        # Among the messages already, unless these are off.
        *([verdict["sentence"]] if verdict and quiet else []),
        *(f"{kind[0].upper()}{kind[1:]} is in {path}." for path in exports),
        f"Next: dino-adapters report {folder.path}",
        f"      dino-adapters embed {exports[0]} DATA --out {folder.path / 'features'}",
    )


def show_plan(recipe: PretrainRecipe, *, json: bool, quiet: bool) -> None:
    """What a run would be, by a short trial."""
    screen.start_messages(quiet=quiet or json)
    from dino_adapters.pretrain.plan import make_plan

    found = make_plan(recipe)
    if json:
        screen.as_json(found.as_json())
        return
    screen.show(found.table())
    screen.say(*found.lines())


def show_replay(place: Path, *, json: bool, quiet: bool) -> None:
    """What a refused step shows when it is computed again."""
    screen.start_messages(quiet=quiet or json)
    from dataclasses import asdict

    from dino_adapters.pretrain.replay import replay

    found = replay(place)
    if json:
        screen.as_json(asdict(found))
        return
    screen.say(*found.sentences())


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_SOURCE",
            help="A finished run, or anything that load_backbone opens: an official .pth, a timm "
            "name, a transformers folder.",
        ),
    ],
    out: Out,
    checkpoint: Checkpoint = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export that stands there already.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a backbone as safetensors with a card, and in the layouts of timm and transformers.

    Example: `dino-adapters export runs/a --out backbones/photos`
    """
    screen.start_messages(quiet=quiet or json)
    from dino_adapters.backbones import build_network, export_backbone
    from dino_adapters.contracts import CheckpointError
    from dino_adapters.runtime.console import Notices
    from dino_adapters.runtime.runfolder import RunFolder

    run = RunFolder(Path(source))
    if run.holds_a_run:
        if not run.export.is_dir():
            raise CheckpointError(
                f"The run in {source} has not ended, so it has no export yet. Continue it: "
                f"dino-adapters pretrain {run.recipe_file} --out {source} --resume"
            )
        source = str(run.export)
    notices = Notices()
    network, info = build_network(
        source, checkpoint=Path(checkpoint) if checkpoint else None, notices=notices
    )
    written = export_backbone(network, info, out, overwrite=overwrite)
    files = sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file())
    if json:
        found = {"export": str(written), "name": info.name, "licence": info.licence, "files": files}
        screen.as_json(found | {"notices": list(notices.summary())})
        return
    screen.say(
        f"{info.name} is in {written}: {', '.join(files)}.",
        f"Licence of the weights: {info.licence}.",
        *notices.summary(),
    )

"""start, pretrain, export: from images to a backbone of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    RecipeWord,
    Shots,
    ValueRange,
    band_names,
    low_and_high,
    recipe_and_overrides,
    shot_counts,
)


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
    recipe: RecipeWord,
    overrides: Overrides = None,
    *,
    out: Out,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the run in --out.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a network without labels on your own images, and export its backbone.

    Examples:
    `dino-adapters pretrain pretrain/smoke.py data.source=photos --out runs/a`

    `dino-adapters pretrain pretrain/smoke.py data.source=photos --out runs/a --resume`
    """
    from dino_adapters.contracts import RecipeError
    from dino_adapters.recipes.pretrain import PretrainRecipe
    from dino_adapters.recipes.read import read_recipe
    from dino_adapters.runtime.runfolder import RunFolder

    path, words = recipe_and_overrides(recipe, overrides)
    settings = read_recipe(path, PretrainRecipe, words)
    if resume and overwrite:
        raise RecipeError("--resume goes on with a run and --overwrite removes it. Give one.")
    folder = RunFolder(out)
    screen.start_messages(quiet=quiet or json, folder=folder, afresh=overwrite)
    from dino_adapters.pretrain import pretrain as train

    exported = train(
        settings,
        folder,
        resume=resume,
        overwrite=overwrite,
        overrides=words,
        quiet=quiet or json,
    )
    rows = [folder, *folder.phases.values()][-1].rows()
    if json:
        screen.as_json({"run": str(out), "export": str(exported), "last": rows[-1] if rows else {}})
        return
    exports = sorted(card.parent for card in exported.rglob("card.json"))
    screen.say(
        *(f"A frozen backbone is in {path}." for path in exports),
        f"Next: dino-adapters report {out}",
        f"      dino-adapters embed {exports[0]} DATA --out {out / 'features'}",
    )


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

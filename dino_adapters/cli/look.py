"""doctor, inspect, embed: look before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dino_adapters.cli import screen
from dino_adapters.cli.options import (
    Bands,
    Checkpoint,
    Device,
    Json,
    Labels,
    Out,
    Quiet,
    ValueRange,
    band_names,
    low_and_high,
)


def doctor(json: Json = False) -> None:
    """Is this machine ready? Versions, GPU, known bad combinations, disk and memory.

    Ends with exit code 1 if there is a problem to solve.
    """
    from dino_adapters.cli.doctor import as_rows, as_table, examine

    findings = examine()
    ready = all(finding.state != "problem" for finding in findings)
    if json:
        screen.as_json({"ready": ready, "findings": as_rows(findings)})
    else:
        screen.show(as_table(findings))
    if not ready:
        raise typer.Exit(1)


def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder, a pattern or a CSV with a column path.")
    ],
    labels: Labels = None,
    bands: Bands = None,
    value_range: ValueRange = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What is in a set of images: sizes, kinds, bands, classes, broken files and duplicates.

    Example: `dino-adapters inspect photos --labels folder`
    """
    screen.start_messages(quiet=quiet or json)
    from dino_adapters.data import open_source
    from dino_adapters.data.audit import inspect as look

    source = open_source(
        data, labels=labels, bands=band_names(bands), value_range=low_and_high(value_range)
    )
    found = look(source, quiet=quiet or json)
    if json:
        screen.as_json(found.as_json())
        return
    from dino_adapters.cli.inspection import as_tables

    for table in as_tables(found):
        # Title and note as lines: within a narrow table they would be folded to its width.
        screen.say(table.title)
        screen.show(replace(table, title="", note=""))
        if table.note:
            screen.say(table.note, "")
    if found.suggestions:
        screen.say("What to do:", *(f"- {sentence}" for sentence in found.suggestions))


def embed(
    backbone: Annotated[
        str,
        typer.Argument(
            metavar="BACKBONE",
            help="An export folder, a catalogue name, an official .pth, a timm name or a "
            "transformers folder.",
        ),
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder, a pattern or a CSV with a column path.")
    ],
    out: Out,
    size: Annotated[
        int | None,
        typer.Option(help="Side in pixels that images are read at; default: the backbone's own."),
    ] = None,
    fit: Annotated[
        str, typer.Option(help="crop (the middle square) or squash (all of it, distorted).")
    ] = "crop",
    patches: Annotated[bool, typer.Option("--patches", help="Keep all patch tokens too.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 32,
    bands: Bands = None,
    value_range: ValueRange = None,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put images through a frozen backbone once, and keep the vectors.

    An interrupted run goes on where it stopped; a second run computes nothing.

    Example: `dino-adapters embed runs/a/export photos --out runs/a/features`
    """
    screen.start_messages(quiet=quiet or json)
    from dino_adapters.backbones import load_backbone
    from dino_adapters.contracts import RecipeError
    from dino_adapters.data import open_source
    from dino_adapters.features import embed as compute
    from dino_adapters.runtime.console import Notices
    from dino_adapters.runtime.world import pick_device

    if fit not in ("crop", "squash"):
        raise RecipeError(f"--fit is '{fit}'. Use crop or squash.")
    notices = Notices()
    source = open_source(
        data, bands=band_names(bands), value_range=low_and_high(value_range), notices=notices
    )
    frozen = load_backbone(
        backbone,
        checkpoint=Path(checkpoint) if checkpoint else None,
        device=pick_device(device),
        notices=notices,
    )
    store = compute(
        frozen,
        source,
        out,
        size=size,
        fit=fit,
        patches=patches,
        batch_size=batch_size,
        quiet=quiet or json,
        notices=notices,
    )
    if json:
        found = {
            "store": str(store.folder),
            "images": len(store.keys),
            "embed_dim": frozen.info.embed_dim,
            "size": store.spec.size,
            "backbone": frozen.info.name,
            "backbone_digest": frozen.info.digest,
            "notices": list(notices.summary()),
        }
        screen.as_json(found)
        return
    screen.say(
        f"{len(store.keys)} of {len(source)} images, {frozen.info.embed_dim} numbers each, are in "
        f"{store.folder}.",
        *notices.summary(),
    )

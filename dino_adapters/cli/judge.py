"""fit, evaluate, report: what labels are worth on a frozen backbone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino_adapters.cli import screen
from dino_adapters.cli.options import (
    Json,
    Out,
    Overrides,
    Overwrite,
    Quiet,
    RecipeWord,
    recipe_and_overrides,
)

if TYPE_CHECKING:
    from dino_adapters.recipes.task import TaskRecipe


def fit(
    recipe: RecipeWord,
    overrides: Overrides = None,
    *,
    out: Out,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a head on labelled images, with a frozen backbone.

    Example: `dino-adapters fit tasks/web/photos/recipe.py backbone=runs/a/export --out runs/b`
    """
    from dino_adapters.runtime.runfolder import RunFolder

    settings, words = _task_recipe(recipe, overrides)
    folder = RunFolder(out)
    screen.start_messages(quiet=quiet or json, folder=folder, afresh=overwrite)
    from dino_adapters.study.task import fit_task

    fitted = fit_task(settings, folder, overwrite=overwrite, overrides=words, quiet=quiet or json)
    if json:
        screen.as_json({"run": str(out), **fitted.facts})
        return
    for size, score in fitted.validation.items():
        chosen = " (chosen)" if len(fitted.validation) > 1 and size == fitted.size else ""
        screen.say(f"Validation at {size} px: {100 * score:.1f} % balanced accuracy{chosen}.")
    screen.say(
        f"The head is in {out / 'head'}.",
        f"Next: dino-adapters evaluate {out}",
    )


def evaluate(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_RUN",
            help="Recipe file, or the folder that `fit` wrote to.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Where everything goes; not needed with the folder of a run.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge a head on test images, with intervals; fit it first if that has not been done.

    Examples:
    `dino-adapters evaluate runs/b`

    `dino-adapters evaluate tasks/web/photos/recipe.py backbone=runs/a/export --out runs/b`
    """
    from dino_adapters.contracts import RecipeError
    from dino_adapters.runtime.runfolder import RunFolder

    held = RunFolder(Path(recipe))
    if held.holds_a_run:
        if overrides or overwrite or out not in (None, held.path):
            raise RecipeError(
                f"{recipe} is a run, which is judged as it is. For other settings give a recipe "
                "and a new folder with --out."
            )
        out, (settings, words) = held.path, _task_recipe(str(held.recipe_file), None)
    elif out is None:
        raise RecipeError(
            f"{recipe} is not the folder of a run, so a place for the results is needed. Name one "
            "with --out."
        )
    else:
        settings, words = _task_recipe(recipe, overrides)
    folder = RunFolder(out)
    screen.start_messages(quiet=quiet or json, folder=folder, afresh=overwrite)
    from dino_adapters.study.task import evaluate_task

    done = evaluate_task(
        settings, folder, overwrite=overwrite, overrides=words, quiet=quiet or json
    )
    if json:
        found = {"run": str(out), "metrics": [asdict(metric) for metric in done.metrics]}
        shots = None if done.shots is None else done.shots.summary_json()
        screen.as_json(found | {"few_shot": shots, "notes": list(done.notes)})
        return
    from dino_adapters.study.runs import metric_table

    screen.show(metric_table(done.metrics))
    if done.shots is not None:
        screen.show(done.shots.table())
    screen.say(*done.comparisons, *done.notes, f"Next: dino-adapters report {out}")


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's report: one HTML file, RUN/report/index.html, that opens anywhere.

    Example: `dino-adapters report runs/a`
    """
    screen.start_messages(quiet=quiet or json)
    from dino_adapters.runtime.runfolder import RunFolder
    from dino_adapters.study.page import write_page
    from dino_adapters.study.runs import run_report

    folder = RunFolder(run)
    made = run_report(folder)
    page = write_page(made, folder.report / "index.html")
    if json:
        screen.as_json({"report": str(page), **screen.report_as_json(made)})
        return
    screen.say(*made.summary, f"The report: {page}")


def _task_recipe(recipe: str, overrides: list[str] | None) -> tuple[TaskRecipe, list[str]]:
    from dino_adapters.recipes.read import read_recipe
    from dino_adapters.recipes.task import TaskRecipe

    path, words = recipe_and_overrides(recipe, overrides)
    return read_recipe(path, TaskRecipe, words), words

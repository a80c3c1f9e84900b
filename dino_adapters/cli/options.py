"""Words that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dino_adapters.contracts import RecipeError

RecipeWord = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Recipe file (.py, .yaml, .json). A .py recipe is code: run only those you trust.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that replace those of the recipe, e.g. data.source=photos optim.lr=3e-4.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="FOLDER", help="Where everything goes.", show_default=False),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a run that stands in the folder already.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no messages but warnings.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
Labels = Annotated[
    str | None,
    typer.Option(
        help="CSV with the columns path and label (and group), or 'folder': the folder's name.",
        metavar="CSV|folder",
        show_default=False,
    ),
]
Bands = Annotated[
    str | None,
    typer.Option(
        help="Names of the files' channels in order, e.g. red,green,blue,nir.",
        metavar="NAMES",
        show_default=False,
    ),
]
ValueRange = Annotated[
    str | None,
    typer.Option(
        "--value-range",
        help="File values that mean 0 and 1, for 16-bit and float images, e.g. 0,65535.",
        metavar="LOW,HIGH",
        show_default=False,
    ),
]
Shots = Annotated[
    str,
    typer.Option(help="Labelled images of a class, e.g. 1,5,10.", metavar="NUMBERS"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", metavar="NAME")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Weights file for a timm name, where they are not to be downloaded.",
        metavar="FILE",
        show_default=False,
    ),
]


def recipe_and_overrides(recipe: str, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Splits the words of a command: `RECIPE key=value ...`, where the recipe may be left out."""
    words = list(overrides or [])
    if "=" in recipe and not Path(recipe).exists():
        return None, [recipe, *words]
    return recipe, words


def band_names(text: str | None) -> tuple[str, ...] | None:
    """`red, green` -> ("red", "green")."""
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def low_and_high(text: str | None) -> tuple[float, float] | None:
    """`0,65535` -> (0.0, 65535.0).

    Raises:
        RecipeError: there are not two numbers, the smaller first.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise RecipeError(
            f"--value-range is '{text}'. Give two numbers, the file values that mean 0 (black) and "
            "1, the smaller first, e.g. --value-range 0,65535."
        )
    return low, high


def shot_counts(text: str) -> tuple[int, ...]:
    """`1,5,10` -> (1, 5, 10).

    Raises:
        RecipeError: something there is no number of 1 or more.
    """
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        counts = (0,)
    if counts[0] < 1:
        raise RecipeError(f"--shots is '{text}'. Give numbers of 1 or more, e.g. --shots 1,5,10.")
    return counts

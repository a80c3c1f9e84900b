"""dino-adapters: the commands, and how errors and interrupts end them [typer, rich]."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import dino_adapters
from dino_adapters.cli import judge, look, screen, train
from dino_adapters.contracts import DinoAdaptersError

# On a machine whose cores are busy, threads that spin at every barrier make training two to
# thirty times slower. They only count before torch loads, and a user's own setting wins.
CALM_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
INTERRUPTED = 130
_WORDS = "dino_adapters.words"

EPILOG = """
**First steps**\n
`dino-adapters doctor` : is this machine ready?\n
`dino-adapters start` : the whole way on example images, in some minutes\n
`dino-adapters start --data photos --labels labels.csv` : the same on your images\n
`dino-adapters inspect photos` : what is in a folder of images?\n
`dino-adapters pretrain pretrain/smoke.py data.source=photos --out runs/a` : train\n
`dino-adapters pretrain --help` : all about one command
"""


class Commands(TyperGroup):
    """The group of commands: turns our errors into one sentence and an exit code.

    Errors that are not ours keep their traceback: they are bugs, and the traceback is the report.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps the words, so that an error knows how the user wants to hear of it."""
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        words = ctx.meta.get(_WORDS, ())
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            hint = "; continue with --resume" if "pretrain" in words[:1] else ""
            screen.complain(f"interrupted{hint}.")
            raise typer.Exit(INTERRUPTED) from None
        except DinoAdaptersError as error:
            if "--json" in words:
                screen.as_json({"error": str(error), "exit_code": error.exit_code})
            else:
                screen.complain(str(error))
            raise typer.Exit(error.exit_code) from error
        finally:
            screen.stop_messages()


app = typer.Typer(
    name="dino-adapters",
    cls=Commands,
    help=dino_adapters.__doc__,
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        screen.say(dino_adapters.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Pretraining without labels, a frozen backbone, and what few labels are worth on it."""


_PANELS = {
    "Look first": (look.doctor, look.inspect),
    "The whole way": (train.start,),
    "Step by step": (
        train.pretrain,
        train.export,
        look.embed,
        judge.fit,
        judge.evaluate,
        judge.report,
    ),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)


def run() -> None:
    """The console script. Exit codes: 0 done, 2 usage or recipe, 3 to 8 see contracts.errors."""
    for name, value in CALM_THREADS.items():
        os.environ.setdefault(name, value)
    # albumentations, where installed, asks a server for its newest version when imported.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    app()


if __name__ == "__main__":
    run()

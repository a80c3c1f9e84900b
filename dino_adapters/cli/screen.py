"""What the commands show: text and tables on stdout, messages on stderr, JSON for machines."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from dino_adapters.contracts import Report, Table
    from dino_adapters.runtime.runfolder import RunFolder

LOGGER = logging.getLogger("dino_adapters")


class StderrHandler(logging.Handler):
    """Log messages on stderr, through rich so that they appear above a running progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message; anything above information begins with its level."""
        try:
            loud = record.levelno >= logging.WARNING
            line = Text()
            if loud:
                line.append(f"{record.levelname.lower()}: ", style="bold yellow")
            # Text, not str: a file called '[red].png' must not be read as a colour.
            line.append(self.format(record))
            self._console.print(line)
        except Exception:
            self.handleError(record)


class RunLogHandler(logging.Handler):
    """Copies messages to a run's log.txt, once the folder holds the run.

    Until then they wait: a folder with a stray log.txt would be refused as a new run's folder.
    """

    def __init__(self, folder: RunFolder, *, afresh: bool = False) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._folder = folder
        self._waiting: list[str] = []
        self._replaced = self._run() if afresh else None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the message, or keeps it."""
        try:
            self._waiting.append(self.format(record))
            self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Writes what waits, where the folder is ready."""
        if self._waiting and self._run() not in (None, self._replaced):
            with (self._folder.path / "log.txt").open("a", encoding="utf-8") as opened:
                opened.writelines(f"{line}\n" for line in self._waiting)
            self._waiting.clear()

    def _run(self) -> tuple[int, int] | None:
        """Tells one run in the folder from the next; None without a run."""
        try:
            facts = self._folder.recipe_file.stat()
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns

    def close(self) -> None:
        """Flushes first: the folder may have become ready after the last message."""
        self.flush()
        super().close()


def start_messages(
    *, quiet: bool = False, folder: RunFolder | None = None, afresh: bool = False
) -> None:
    """Sends the library's messages to stderr, and to the run's log where there is one.

    Args:
        quiet: Only warnings and errors on stderr; the run's log gets everything.
        folder: The run that is about to begin or go on.
        afresh: A run that stands there now is to be replaced: its log is left alone.
    """
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.setLevel(logging.INFO)
    shown = StderrHandler()
    shown.setLevel(logging.WARNING if quiet else logging.INFO)
    LOGGER.addHandler(shown)
    if folder is not None:
        LOGGER.addHandler(RunLogHandler(folder, afresh=afresh))


def stop_messages() -> None:
    """Takes the handlers off again and closes the run's log."""
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()


def say(*sentences: str) -> None:
    """Prints plain lines on stdout."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for sentence in sentences:
        console.print(sentence)


def show(table: Table) -> None:
    """Prints a table on stdout."""
    from dino_adapters.study.page import terminal_table

    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: wide enough that no cell is folded.
        console = Console(highlight=False, width=120)
    console.print(terminal_table(table))


def complain(sentence: str) -> None:
    """Prints one error on stderr."""
    line = Text("error: ", style="bold red")
    line.append(sentence, style="not bold default")
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def as_json(value: Mapping[str, Any] | list[Any]) -> None:
    """Prints a value as JSON on stdout; numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    say(text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


def report_as_json(report: Report) -> dict[str, Any]:
    """A report's words and tables; figures are in the page."""
    return {
        "title": report.title,
        "summary": list(report.summary),
        "tables": [
            {
                "title": table.title,
                "header": list(table.header),
                "rows": [list(r) for r in table.rows],
            }
            for table in report.tables
        ],
        "notes": list(report.notes),
        "provenance": dict(report.provenance),
    }

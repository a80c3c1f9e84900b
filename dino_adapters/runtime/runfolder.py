"""RunFolder: where a run keeps everything that it was told and everything that it found.

recipe.json          the resolved recipe          asked.json         as it was given, with its autos
overrides.txt        key=value words              environment.json   versions, machine
log.txt              for people
metrics.jsonl        for machines, a row a note   checkpoints/  export/  report/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dino_adapters.contracts import DiskFullError, RunFolderError
from dino_adapters.runtime.files import write_json, write_text

LOCK = ".lock"
PACKAGES = ("dino-adapters", "torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn")


class RunFolder:
    """Layout of one run's folder; all writes are atomic or append whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe as JSON."""
        return self.path / "recipe.json"

    @property
    def asked_file(self) -> Path:
        """The recipe as it was given, before the data settled anything."""
        return self.path / "asked.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Training states, one folder a step."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The exported backbone."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """Pages and pictures."""
        return self.path / "report"

    @property
    def phases(self) -> dict[str, RunFolder]:
        """The phases of a run that has several, by name, in order, those that were begun."""
        found = sorted(self.path.glob("phases/*"), key=lambda path: int(path.name.split("_")[0]))
        return {path.name.split("_", 1)[1]: RunFolder(path) for path in found}

    def phase(self, index: int, name: str) -> RunFolder:
        """Where a phase lives; `index` counts from 1."""
        return RunFolder(self.path / "phases" / f"{index}_{name}")

    @property
    def holds_a_run(self) -> bool:
        """Whether a run was started here."""
        return self.recipe_file.exists()

    def begin(
        self,
        recipe: dict[str, Any],
        overrides: Sequence[str] = (),
        *,
        asked: dict[str, Any] | None = None,
        resumable: bool = True,
    ) -> None:
        """Creates the folder and writes what the run was told.

        Args:
            recipe: The resolved recipe.
            overrides: `key=value` words of the command line.
            asked: The recipe as it was given; None is `recipe`.
            resumable: Whether the command has --resume, which the refusal then offers.

        Raises:
            RunFolderError: the folder holds a run already, or files that are not ours, or it
                cannot be written.
        """
        if self.holds_a_run:
            offer = "Continue it with --resume, name" if resumable else "Name"
            raise RunFolderError(
                f"{self.path} already holds a run. {offer} another folder with --out, or replace "
                "it with --overwrite."
            )
        strangers = sorted(p.name for p in self.path.glob("*") if not p.name.startswith("."))
        if self.path.exists() and (not self.path.is_dir() or strangers):
            shown = f" ({', '.join(strangers[:3])})" if strangers else ""
            raise RunFolderError(
                f"{self.path} exists and holds other files{shown}. Name an empty or a new folder "
                "with --out."
            )
        self._make()
        write_json(self.path / "environment.json", environment())
        write_text(self.path / "overrides.txt", "".join(f"{word}\n" for word in overrides))
        write_json(self.asked_file, recipe if asked is None else asked)
        write_json(self.recipe_file, recipe)  # last: its presence says that the folder is complete

    def empty(self) -> None:
        """Removes the run that stands here, for the one who holds the lock.

        A folder without a run is left as it is: `begin` refuses files that are not ours.
        """
        if not self.holds_a_run:
            return
        self.recipe_file.unlink()  # first: what is left of a half-removed run is no run
        for entry in self.path.iterdir():
            if entry.name == LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @contextlib.contextmanager
    def lock(self, *, only: bool = True) -> Iterator[None]:
        """Holds the folder for one writer; the lock goes with the process.

        Args:
            only: False does nothing: another process of this job holds it for all.

        Raises:
            RunFolderError: another process writes here, or the folder cannot be written.
        """
        if not only:
            yield
            return
        self._make()
        try:
            opened = (self.path / LOCK).open("a")
        except OSError as error:
            raise self._unwritable(error) from error
        with opened as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunFolderError(
                    f"Another process is writing to {self.path}. Wait for it, or name another "
                    "folder with --out."
                ) from error
            yield

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise RunFolderError(
                f"{self.path} is a file, and a run needs a folder. Name another one with --out."
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"The folder {self.path} cannot be written ({error.strerror or error}). Name another "
            "one with --out, or change its permissions."
        )

    def note(self, row: dict[str, Any]) -> None:
        """Appends one row to metrics.jsonl; non-finite numbers are written as null.

        Raises:
            DiskFullError: there is no room, or the file cannot be written for another reason.
        """
        line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
        try:
            with self.metrics_file.open("a", encoding="utf-8") as opened:
                opened.write(line + "\n")
        except OSError as error:
            raise DiskFullError(
                f"{self.metrics_file} cannot be written ({error.strerror or error}). Make room, "
                "and go on with --resume: saved states are whole."
            ) from error

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a half-written last line is left out."""
        if not self.metrics_file.exists():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def rows_with(self, name: str) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl that hold this number, as those of steps hold `loss`."""
        return [row for row in self.rows() if name in row]

    def keep_rows(self, which: Callable[[dict[str, Any]], bool]) -> None:
        """Removes the other rows, which a run that was resumed or went back will write again."""
        kept = [row for row in self.rows() if which(row)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_text(self.metrics_file, lines)


def environment() -> dict[str, Any]:
    """Versions and machine, without names of hosts, users or paths."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": sys.version.split()[0],
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": versions,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value

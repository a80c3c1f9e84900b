"""Scalars for TensorBoard, beside `metrics.jsonl`; the library comes with the extra `monitor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dino_adapters.runtime.lookup import need


def check_installed() -> None:
    """Asks for the library that torch's writer writes with.

    Raises:
        MissingLibraryError: TensorBoard is absent.
    """
    need("tensorboard", extra="monitor")


class Board:
    """Writes rows of a run as TensorBoard scalars, each number under its own name.

    Args:
        folder: Of the event files; made if it is not there. Each process that goes on with the
            run adds a file, and TensorBoard joins them.
        first_step: What was written of this step and later ones, before a run was resumed or
            taken back, is hidden.

    Raises:
        MissingLibraryError: TensorBoard is absent.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        check_installed()  # torch brings the writer, and not what it writes with
        writer = need("torch.utils.tensorboard", extra="monitor").SummaryWriter
        self._writer = writer(log_dir=str(folder), purge_step=first_step or None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row at its `step`; what is no number is left to the table."""
        step = int(row["step"])
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left in memory."""
        self._writer.close()

    def __enter__(self) -> Self:
        """The board itself; leaving closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

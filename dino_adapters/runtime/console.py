"""What a person reads while something runs: progress, and notices said once with their count."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

LOGGER = logging.getLogger("dino_adapters")
LINE_EVERY_S = 30.0


@dataclass
class Notices:
    """Counts of things that were skipped, clipped, replaced or assumed.

    A fresh one is passed to whoever reads or converts data. `add` logs the first case of each kind
    at once, so that nothing is silent; `summary` gives the final counts for logs and reports.
    An example that was named before is the same case again and is not counted twice, so that
    files read in every epoch count once. Several threads may add at once.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    max_examples: int = 5
    _seen: set[tuple[str, str]] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, what: str, example: str = "", count: int = 1) -> None:
        """Notes `count` cases of `what`; the first one is logged."""
        with self._lock:
            if example:
                if (what, example) in self._seen:
                    return
                self._seen.add((what, example))
            first = what not in self.counts
            self.counts[what] += count
            names = self.examples.setdefault(what, [])
            if example and len(names) < self.max_examples and example not in names:
                names.append(example)
        if first:
            LOGGER.warning("%s%s", what, f" (first: {example})" if example else "")

    def summary(self) -> tuple[str, ...]:
        """One line per kind: what, how often, and a few names."""
        lines = []
        for what, count in sorted(self.counts.items()):
            names = self.examples.get(what, [])
            shown = f": {', '.join(names)}{', …' if count > len(names) else ''}" if names else ""
            lines.append(f"{what} ({count}×){shown}")
        return tuple(lines)


class Progress:
    """A bar on a terminal; a line every 30 s elsewhere. Use through `progress`."""

    def __init__(self, label: str, total: int, *, begun: int, quiet: bool) -> None:
        self.label, self.total, self.begun, self.done = label, total, begun, begun
        self._quiet = quiet
        self._started = self._said = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(label, total=total, completed=begun, note="")
            self._bar.start()

    def step(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` (e.g. the loss) is shown beside the bar."""
        self.done += count
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=note)
            return
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S and self.done < self.total:
            self._said = now
            each = (now - self._started) / max(self.done - self.begun, 1)
            left = each * (self.total - self.done)
            LOGGER.info(
                "%s: %d of %d, about %s left%s",
                self.label,
                self.done,
                self.total,
                duration(left),
                f", {note}" if note else "",
            )

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def progress(label: str, total: int, *, begun: int = 0, quiet: bool = False) -> Iterator[Progress]:
    """Shows how far `total` units of work, of which some were done before, have come."""
    shown = Progress(label, total, begun=begun, quiet=quiet)
    try:
        yield shown
    finally:
        shown.close()


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

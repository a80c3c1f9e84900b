"""Ending on request: SIGTERM asks a run to save its state before it goes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Whether the process was asked to end."""

    asked: bool = False


@contextlib.contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Turns SIGTERM into a request that the loop can answer between two steps.

    Clusters send it before they take a machine away. A second one ends the process at once.
    Signals reach the main thread alone: elsewhere nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: Any) -> None:
        request.asked = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)

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


_request: StopRequest | None = None


@contextlib.contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Turns SIGTERM into a request that the loop can answer between two steps.

    Clusters send it before they take a machine away. A second one ends the process at once.
    Signals reach the main thread alone: elsewhere nothing is changed.
    """
    global _request
    if _request is not None:  # one of a larger job, such as a phase: what it is asked, all are
        yield _request
        return
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: Any) -> None:
        request.asked = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, ask)
    _request = request
    try:
        yield request
    finally:
        _request = None
        signal.signal(signal.SIGTERM, before)

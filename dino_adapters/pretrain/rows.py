"""Rows of `metrics.jsonl`: those of steps, and those of looks, whose numbers are `watch/SIGN`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "watch/"


def is_look(row: Mapping[str, Any]) -> bool:
    """Whether a row is a look, and not a step."""
    return any(key.startswith(PREFIX) for key in row)


def is_before(row: Mapping[str, Any], done: int) -> bool:
    """Whether a row was noted when so many steps were done, a look after the last included."""
    return int(row.get("step", -1)) < done + is_look(row)


def steps_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of steps that were applied."""
    return [dict(row) for row in rows if row.get("loss") is not None and not row.get("skipped")]

"""Whole files or none: atomic writes, and digests of what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it replaces `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private to their owner; results follow the user's umask instead.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
    """Writes indented JSON atomically; NaN is refused, as other readers would choke on it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=default)
    write_text(path, text + "\n")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, or of none; both have the same parent."""
    if not folder.exists() or not any(folder.iterdir()):
        temporary.replace(folder)  # an empty folder may be replaced
        return
    # Two renames: a reader finds the old export or the new one, or for an instant none.
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.replace(old)
    try:
        temporary.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def file_digest(path: Path) -> str:
    """Hex BLAKE2b-128 digest of a file's content."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def json_digest(value: Any) -> str:
    """Hex BLAKE2b-128 digest of a JSON-safe value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

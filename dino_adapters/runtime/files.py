"""Whole files or none: atomic writes, full disks, and digests of what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_adapters.contracts import DiskFullError

if TYPE_CHECKING:
    from torch import Tensor

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space on the disk, in a quota, or in a file."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")


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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file through to the disk; not atomically.

    Args:
        path: the file; its folder is there.
        tensors: contiguous ones that share no memory.
        metadata: texts for the file's header.

    Raises:
        OSError: it cannot be written; safetensors alone would tell that as an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        if (found := OS_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    with path.open("rb+") as written:
        os.fsync(written.fileno())


@contextlib.contextmanager
def needs_room(what: str, folder: Path, size: int, advice: str) -> Iterator[None]:
    """Tells a full disk as what it is, whatever was being written; other errors pass.

    Args:
        what: begins the sentence: `The export /a/b`.
        folder: where it goes, there or not yet.
        size: bytes that it takes.
        advice: what to do, and what is whole.

    Raises:
        DiskFullError: the disk, a quota or the largest file allowed is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        raise DiskFullError(
            f"{what} could not be written ({os.strerror(error.errno)}). It takes "
            f"{size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. {advice}"
        ) from error


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, or of none; both have the same parent."""
    if not folder.exists() or not any(folder.iterdir()):
        temporary.replace(folder)  # an empty folder may be replaced
        return
    # Two renames: a reader finds the old export or the new one, or for an instant none.
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        folder.replace(old)
        temporary.replace(folder)
    except OSError:
        # The old content back, or an empty folder away.
        if folder.exists():
            old.rmdir()
        else:
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

"""Work of several processes that succeeds on all of them, or fails on all with the same error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dino_adapters.contracts import DinoAdaptersError
from dino_adapters.runtime.files import FULL
from dino_adapters.runtime.world import World

T = TypeVar("T")


def together(work: Callable[[], T], world: World) -> list[T]:
    """What `work` returned on each process; where it failed on one, its error on all."""
    own: tuple[T | None, Exception | None]
    try:
        own = work(), None
    except (Exception, CheckpointException) as error:
        own = None, reason(error)
        ours = isinstance(error, Exception) and type(own[1]) is RuntimeError
        if world.size == 1 and ours:
            raise  # with its own traceback
    found = [own] * world.size
    if world.size > 1:
        dist.all_gather_object(found, own)
    for _, error in found:
        if error is not None:
            raise error
    return [cast(T, value) for value, _ in found]


def reason(error: BaseException) -> Exception:
    """What an error arose from, in a form that other processes can read.

    A full disk comes first, as torch may have met other errors while it cleaned up; then ours.
    """
    chain = list(_chain(error))
    for found in chain:
        if not isinstance(found, Exception | CheckpointException):
            raise found  # somebody interrupted the run
        if isinstance(found, OSError) and found.errno in FULL:
            return OSError(found.errno, os.strerror(found.errno))
    for found in chain:
        if isinstance(found, DinoAdaptersError):
            return type(found)(str(found))
    last = chain[-1]
    return RuntimeError(f"{type(last).__name__}: {last}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it arose from, also on other processes."""
    yield error
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            yield from _chain(failure)
    elif inner := error.__cause__ or error.__context__:
        yield from _chain(inner)

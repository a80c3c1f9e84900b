"""How the processes of a job find each other, when it starts and when it starts again.

They tell each other their addresses through a store that torchrun serves. When a process dies,
torchrun starts all of them again on the same store, with the addresses of the dead still in it:
whoever reads before the others have written anew calls a process that is gone, and the job fails
with "connection refused" (`DynamicRendezvousHandler.next_rendezvous` of torch 2.15 builds
that store once; github.com/pytorch/pytorch/issues/135712). So the processes first agree on a part
of the store that no earlier start has written to. The count of restarts cannot name it: of several
machines, each counts its own.
"""

from __future__ import annotations

import functools
import os
import time
import uuid
from datetime import timedelta

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

PAUSE = 0.02
"""Seconds between two looks for the processes that are still missing."""


def meet(rank: int, size: int, patience: timedelta) -> Store:
    """A store that no earlier start of the job has written to, once all its processes are there.

    Reads MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Args:
        rank: number of this process.
        size: how many there are.
        patience: how long to wait for the store, and then for the others.

    Raises:
        DistError: the store cannot be reached, or not all came in time.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return fresh_part(_common(address, port, rank, size, patience), rank, size, patience)


@functools.cache
def _common(address: str, port: str, rank: int, size: int, patience: timedelta) -> Store:
    """The store that all processes reach.

    Kept as long as this process lives: without torchrun the first process serves it, and others
    that join a second time would reach it while it closes.
    """
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=patience)))
    return store


def fresh_part(store: Store, rank: int, size: int, patience: timedelta) -> Store:
    """The part of a store that the processes of this start agree on, once all are there.

    Each process but the first leaves a name that was never used before and waits for an answer to
    it. The first answers every name that it finds, those of the dead too, with the name of the
    part, until each rank's present name is signed there: only the living sign.

    Args:
        store: common to all processes, be it with keys of earlier starts.
        rank: number of this process.
        size: how many there are.
        patience: how long to wait for the others.

    Raises:
        DistStoreError: not all came in time.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"come/{rank}", own)
        try:
            store.wait([f"answer/{own}"], patience)
            part = store.get(f"answer/{own}").decode()
            store.set(f"{part}/signed/{own}", "")
            store.wait([f"{part}/complete"], patience)
        except DistStoreError as error:
            raise DistStoreError(
                f"The first process did not see all {size} within {patience}; this is rank {rank}. "
                "Look for the messages of the others and start the job again."
            ) from error
        return PrefixStore(f"{part}/group", store)
    begun = time.monotonic()
    while missing := [other for other in range(1, size) if not _signed(store, other, own)]:
        if time.monotonic() - begun > patience.total_seconds():
            raise DistStoreError(
                f"{len(missing)} of {size} processes, the first of rank {missing[0]}, did not "
                f"come within {patience}. Look for their messages and start the job again."
            )
        time.sleep(PAUSE)
    store.set(f"{own}/complete", "")
    return PrefixStore(f"{own}/group", store)


def _signed(store: Store, other: int, part: str) -> bool:
    """Whether a process that came as this rank has signed; it is told where to."""
    if not store.check([f"come/{other}"]):
        return False
    name = store.get(f"come/{other}").decode()
    store.set(f"answer/{name}", part)
    return store.check([f"{part}/signed/{name}"])

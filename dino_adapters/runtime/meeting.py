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

import time
import uuid
from datetime import timedelta

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

PAUSE = 0.02
"""Seconds between two looks for the processes that are still missing."""


def meet(rank: int, size: int, patience: timedelta) -> Store:
    """The store of this start of the job, empty, after all its processes have come.

    Reads MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Args:
        rank: number of this process.
        size: how many there are.
        patience: how long to wait for the others.

    Raises:
        DistStoreError: not all came in time.
    """
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=patience)))
    store.set_timeout(patience)
    return fresh_part(store, rank, size, patience)


def fresh_part(store: Store, rank: int, size: int, patience: timedelta) -> Store:
    """The part of a store that the processes of this start agree on.

    Each process but the first leaves a name that was never used before and waits for an answer to
    it. The first answers every name, those of the dead too, with the name of the part, and waits
    until each process has signed there: only the living do.

    Args:
        store: common to all processes, be it with keys of earlier starts.
        rank: number of this process.
        size: how many there are.
        patience: how long the first process waits; the others wait as long as the store does.

    Raises:
        DistStoreError: not all came in time.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"come/{rank}", own)
        part = store.get(f"answer/{own}").decode()
        store.set(f"{part}/signed/{rank}", "")
        return PrefixStore(part, store)
    missing, begun = set(range(1, size)), time.monotonic()
    while missing:
        for other in missing:
            if store.check([f"come/{other}"]):
                store.set(f"answer/{store.get(f'come/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"{own}/signed/{other}"])}
        if missing and time.monotonic() - begun > patience.total_seconds():
            raise DistStoreError(
                f"{len(missing)} of {size} processes, the first of rank {min(missing)}, did not "
                f"come within {patience}. Look for their messages and start the job again."
            )
        time.sleep(PAUSE if missing else 0)
    return PrefixStore(own, store)

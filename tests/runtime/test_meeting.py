"""The processes of a job agree on a part of the store, whatever earlier starts left in it."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError
from torch.distributed.rendezvous import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from dino_adapters.runtime.meeting import fresh_part

LIMIT = timedelta(seconds=20)


@pytest.fixture
def server():
    """A store as torchrun serves it; it lives as long as the test."""
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT, wait_for_workers=False)


def client(server):
    return TCPStore(
        "127.0.0.1", server.port, is_master=False, timeout=LIMIT, wait_for_workers=False
    )


def start(server, size, delays):
    """One start of all processes, each with a connection of its own: all hear the first one."""

    def process(rank):
        time.sleep(delays[rank])
        part = fresh_part(client(server), rank, size, LIMIT)
        assert not part.check(["address"])  # nothing of an earlier start
        part.set(f"hello/{rank}", "")
        part.wait([f"hello/{other}" for other in range(size)])  # all are in the same part
        if rank == 0:
            part.set("address", str(delays))
        return part.get("address").decode()

    with ThreadPoolExecutor(size) as pool:
        assert list(pool.map(process, range(size))) == [str(delays)] * size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_start_has_a_part_of_its_own(server, size):
    draws = random.Random(size)
    for _ in range(4):  # the first process comes first, last and between
        delays = [draws.uniform(0, 0.2) for _ in range(size)]
        start(server, size, delays)


@pytest.mark.parametrize("late", [0, 1])
def test_a_start_that_was_killed_half_way_is_passed_over(server, late):
    """One process left a name that nobody answered, one was answered and never signed."""
    for rank, name in ((1, "unanswered"), (2, "answered")):
        server.set(f"come/{rank}", name)
    server.set("answer/answered", "a part that nobody is in")
    delays = [0.0, 0.0, 0.0]
    delays[late] = 0.3
    start(server, 3, delays)


def test_a_process_that_dies_before_all_are_there_is_replaced(server):
    """It has signed and is gone; the one that comes in its place signs anew."""
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(fresh_part, client(server), 0, 3, LIMIT)
        store = client(server)
        store.set("come/2", "dies")
        part = store.get("answer/dies").decode()
        store.set(f"{part}/signed/dies", "")
        time.sleep(0.2)
        assert not first.done()
        others = [pool.submit(fresh_part, client(server), rank, 3, LIMIT) for rank in (2, 1)]
        first.result().set("address", "here")
        assert [other.result().get("address") for other in others] == [b"here", b"here"]


def test_a_process_that_never_comes_is_named(server):
    short = timedelta(seconds=0.2)
    with pytest.raises(DistStoreError, match="2 of 3 processes, the first of rank 1, did not come"):
        fresh_part(client(server), 0, 3, short)
    with pytest.raises(DistStoreError, match=r"all 3 within 0:00:00\.2.*this is rank 2"):
        fresh_part(client(server), 2, 3, short)

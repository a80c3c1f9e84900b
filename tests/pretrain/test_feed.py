"""The feed: a function of the step, whatever the workers, and honest about bad files."""

import pytest
import torch

from dino_adapters.contracts import DataError, UnreadableFileError
from dino_adapters.pretrain.feed import Feed
from dino_adapters.runtime.console import Notices

KEYS = tuple(f"{i:03d}.png" for i in range(11))


def decode(key):
    return torch.full((3, 12, 16), int(key[:3]), dtype=torch.uint8)


def feed(decode=decode, **changes):
    options = {
        "side": 12,
        "batch_size": 4,
        "seed": 0,
        "workers": 0,
        "memory_gb": 1.0,
        "max_unreadable": 0.3,
        "notices": Notices(),
    }
    return Feed(KEYS, decode, **{**options, **changes})


def numbers(batches):
    return [(batch.images[:, 0, 0, 0] * 255).round().int().tolist() for batch in batches]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(workers):
    alone = list(feed().batches(0, 7))
    together = list(feed(workers=workers).batches(0, 7))
    for ours, theirs in zip(alone, together, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.looks, theirs.looks)
        assert ours.keys == theirs.keys


def test_processes_share_a_batch_in_its_order():
    whole = numbers(feed().batches(0, 5))
    halves = [numbers(feed(share=part).batches(0, 5)) for part in (range(2), range(2, 4))]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_keys_are_those_of_the_images():
    for batch in feed().batches(0, 4):
        (seen,) = numbers([batch])
        assert [int(key.split(".")[0]) for key in batch.keys] == seen


def test_starting_in_the_middle_changes_nothing():
    assert numbers(feed().batches(3, 7)) == numbers(feed().batches(0, 7))[3:]


def test_every_epoch_holds_every_image_once_in_another_order():
    seen = [n for batch in numbers(feed(batch_size=11).batches(0, 2)) for n in batch]
    assert sorted(seen[:11]) == sorted(seen[11:]) == list(range(11))
    assert seen[:11] != seen[11:]


def test_memory_changes_nothing_but_the_reads():
    reads = []

    def counted(key):
        reads.append(key)
        return decode(key)

    kept = numbers(feed(counted).batches(0, 9))
    assert len(reads) == 11
    assert numbers(feed(counted, memory_gb=0.0).batches(0, 9)) == kept
    assert len(reads) == 11 + 36


def test_windows_move_along_the_longer_side():
    ramp = torch.arange(16, dtype=torch.uint8).expand(3, 12, 16)
    starts = {int(b.images[0, 0, 0, 0] * 255 + 0.5) for b in feed(lambda _: ramp).batches(0, 40)}
    assert starts == {0, 1, 2, 3, 4}


def broken(key):
    if key in {"002.png", "005.png"}:
        raise UnreadableFileError(f"{key} is cut off")
    return decode(key)


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_files_are_replaced_counted_and_named(workers):
    notices = Notices()
    seen = numbers(feed(broken, workers=workers, notices=notices).batches(0, 6))
    assert not {2, 5} & {n for batch in seen for n in batch}
    assert seen == numbers(feed(broken).batches(0, 6))
    (line,) = notices.summary()
    assert "(2×)" in line
    assert "002.png" in line
    assert "005.png" in line


def test_too_many_bad_files_stop_the_run():
    with pytest.raises(DataError, match="2 of 11 images cannot be read"):
        list(feed(broken, max_unreadable=0.1).batches(0, 6))

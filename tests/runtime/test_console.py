"""Notices are said once and counted, from any thread; durations read well."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from dino_adapters.runtime.console import Notices, duration, progress


def test_each_kind_is_said_once_and_counted(caplog):
    notices = Notices()
    with caplog.at_level(logging.WARNING):
        for index in range(7):
            notices.add("file skipped", f"{index}.png")
        notices.add("clipped", count=5)
    assert len(caplog.messages) == 2
    assert notices.summary() == (
        "clipped (5×)",
        "file skipped (7×): 0.png, 1.png, 2.png, 3.png, 4.png, …",
    )


def test_threads_lose_no_count():
    notices = Notices()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: notices.add("seen", str(i)), range(4000)))
        list(pool.map(lambda _: notices.add("clipped", count=2), range(1000)))
    assert notices.counts == {"seen": 4000, "clipped": 2000}


def test_the_same_file_counts_once():
    notices = Notices()
    for _ in range(3):
        notices.add("clipped", "a.tif", 7)
    assert notices.summary() == ("clipped (7×): a.tif, …",)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_lines_off_a_terminal_come_now_and_then(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dino_adapters.runtime.console.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("work", 100) as shown:
        for _ in range(100):
            now[0] += 1.0
            shown.step(note="loss 1.0")
    assert caplog.messages == [
        "work: 30 of 100, about 1 min 10 s left, loss 1.0",
        "work: 60 of 100, about 40 s left, loss 1.0",
        "work: 90 of 100, about 10 s left, loss 1.0",
    ]


def test_what_was_done_before_counts_and_takes_no_time(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dino_adapters.runtime.console.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress("work", 100, begun=60) as shown:
        for _ in range(40):
            now[0] += 1.0
            shown.step()
    assert caplog.messages == ["work: 90 of 100, about 10 s left"]


def test_quiet_says_nothing(caplog, monkeypatch):
    monkeypatch.setattr("dino_adapters.runtime.console.LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), progress("work", 3, quiet=True) as shown:
        shown.step(2)
    assert not caplog.messages

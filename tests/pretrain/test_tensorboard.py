"""TensorBoard's scalars: what is written, and what is said where the library is absent."""

import sys
from types import ModuleType
from typing import ClassVar

import pytest

from dino_adapters.contracts import MissingLibraryError
from dino_adapters.pretrain.tensorboard import Board

ROWS = [
    {"step": 0, "loss": 3.5, "watch/rankme": 12.0},
    {"step": 4, "loss": 2, "koleo": None, "note": "words", "seconds": 1.5},
]


class Writer:
    """Remembers what it was asked to write."""

    made: ClassVar[list["Writer"]] = []

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.written, self.closed = log_dir, purge_step, [], 0
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))

    def close(self):
        self.closed += 1


@pytest.fixture
def writers(monkeypatch):
    stand_in = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(stand_in, "SummaryWriter", Writer, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


def test_numbers_are_written_at_their_step_and_nothing_else(writers, tmp_path):
    with Board(tmp_path / "board") as board:
        for row in ROWS:
            board.add(row)
    (writer,) = writers
    assert writer.written == [
        ("loss", 3.5, 0),
        ("watch/rankme", 12.0, 0),
        ("loss", 2, 4),
        ("seconds", 1.5, 4),
    ]
    assert writer.log_dir == str(tmp_path / "board")
    assert writer.closed == 1


def test_a_resumed_run_hides_what_it_writes_again(writers, tmp_path):
    Board(tmp_path)
    Board(tmp_path, first_step=200)
    assert [writer.purge_step for writer in writers] == [None, 200]


def test_it_is_closed_when_training_fails(writers, tmp_path):
    with pytest.raises(RuntimeError, match="full"), Board(tmp_path):
        raise RuntimeError("disk full")
    assert writers[0].closed == 1


def test_without_the_library_its_install_command_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingLibraryError, match=r"pip install 'dino-adapters\[monitor\]'"):
        Board(tmp_path / "board")
    assert not (tmp_path / "board").exists()


@pytest.mark.optional
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore
        EventAccumulator,
    )

    with Board(tmp_path) as board:
        for row in ROWS:
            board.add(row)
    read = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "seconds", "watch/rankme"]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(0, 3.5), (4, 2.0)]

"""Run folders keep what they hold."""

import json
import subprocess
import sys

import pytest

from dino_adapters.contracts import RunFolderError
from dino_adapters.runtime.runfolder import RunFolder


def test_begin_writes_what_was_told(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({"steps": 3}, ["steps=3"])
    assert json.loads(folder.recipe_file.read_text()) == {"steps": 3}
    assert (folder.path / "overrides.txt").read_text() == "steps=3\n"
    with pytest.raises(RunFolderError, match="--resume"):
        folder.begin({"steps": 4})


def test_strangers_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    folder = RunFolder(tmp_path)
    for attempt in (lambda: folder.begin({}), folder.clear):
        with pytest.raises(RunFolderError):
            attempt()
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_clear_removes_a_run_alone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.clear()
    folder.begin({})
    folder.clear()
    assert not folder.path.exists()


def test_a_second_writer_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    words = (
        "import sys; from pathlib import Path\n"
        "from dino_adapters.contracts import RunFolderError\n"
        "from dino_adapters.runtime.runfolder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "for use in (folder.lock().__enter__, folder.clear):\n"
        "    try: use()\n"
        "    except RunFolderError as error: print(error)\n"
    )
    with folder.lock():
        done = subprocess.run(
            [sys.executable, "-c", words, str(folder.path)],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.count("Another process is writing") == 2
    assert folder.holds_a_run
    with folder.lock():
        pass


def test_rows_survive_a_cut_line_and_numbers_that_json_lacks(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    folder.note({"step": 0, "loss": float("inf"), "terms": [1.0, float("nan")]})
    folder.note({"step": 1, "loss": 2.0})
    with folder.metrics_file.open("a") as opened:
        opened.write('{"step": 2, "lo')
    assert folder.rows() == [
        {"step": 0, "loss": None, "terms": [1.0, None]},
        {"step": 1, "loss": 2.0},
    ]
    folder.drop_rows_from(1)
    assert [row["step"] for row in folder.rows()] == [0]

"""Run folders keep what they hold."""

import json
import subprocess
import sys
from pathlib import Path

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
    folder.empty()
    with pytest.raises(RunFolderError):
        folder.begin({})
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_empty_removes_the_run_and_keeps_the_lock(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.empty()
    with folder.lock():
        folder.begin({})
        (folder.checkpoints / "step_1").mkdir(parents=True)
        folder.empty()
    assert [entry.name for entry in folder.path.iterdir()] == [".lock"]
    folder.begin({})


def test_a_second_writer_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    words = (
        "import sys; from pathlib import Path\n"
        "from dino_adapters.contracts import RunFolderError\n"
        "from dino_adapters.runtime.runfolder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "try: folder.lock().__enter__()\n"
        "except RunFolderError as error: print(error)\n"
    )
    with folder.lock():
        done = subprocess.run(
            [sys.executable, "-c", words, str(folder.path)],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.count("Another process is writing") == 1
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
    folder.keep_rows(lambda row: row["step"] < 1)
    assert [row["step"] for row in folder.rows()] == [0]


def test_only_commands_that_resume_offer_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    with pytest.raises(RunFolderError, match=r"already holds a run\. Name another") as caught:
        folder.begin({}, resumable=False)
    assert "--resume" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "notes").write_text("years")
    for path in (tmp_path / "notes", tmp_path / "notes" / "run"):
        folder = RunFolder(path)
        with pytest.raises(RunFolderError, match="with --out"), folder.lock():
            pass
        with pytest.raises(RunFolderError, match="with --out"):
            folder.begin({})
    assert (tmp_path / "notes").read_text() == "years"


@pytest.mark.parametrize("what", ["mkdir", "open"])
def test_folders_that_cannot_be_written_are_said(tmp_path, monkeypatch, what):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, what, refuse)
    with (
        pytest.raises(RunFolderError, match=r"cannot be written \(Permission denied\)"),
        RunFolder(tmp_path / "run").lock(),
    ):
        pass


def test_a_lock_alone_is_no_strangers_file(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        pass
    folder.begin({})

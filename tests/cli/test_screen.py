"""Messages, the run's log, and JSON."""

import json
import logging

from dino_adapters.cli import screen
from dino_adapters.contracts import Report, Table
from dino_adapters.runtime.runfolder import RunFolder

LOGGER = logging.getLogger("dino_adapters.somewhere")


def test_messages_go_to_stderr_and_warnings_say_so(capsys):
    screen.start_messages()
    LOGGER.info("reading %d files", 3)
    LOGGER.warning("one is [broken]")
    screen.stop_messages()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "reading 3 files\nwarning: one is [broken]\n"


def test_quiet_keeps_warnings(capsys):
    screen.start_messages(quiet=True)
    LOGGER.info("reading")
    LOGGER.warning("broken")
    screen.stop_messages()
    assert capsys.readouterr().err == "warning: broken\n"


def test_the_runs_log_waits_for_the_run(tmp_path, capsys):
    """A log.txt in a folder that holds no run would make `begin` refuse the folder."""
    folder = RunFolder(tmp_path / "run")
    screen.start_messages(quiet=True, folder=folder)
    LOGGER.info("before")
    assert not folder.path.exists()
    folder.begin({"seed": 0})
    LOGGER.info("after")
    screen.stop_messages()
    lines = (folder.path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO before", "INFO after"]


def test_a_refused_run_leaves_no_log(tmp_path):
    folder = RunFolder(tmp_path / "run")
    screen.start_messages(quiet=True, folder=folder)
    LOGGER.info("before")
    screen.stop_messages()
    assert not folder.path.exists()


def test_starting_twice_says_things_once(capsys):
    screen.start_messages()
    screen.start_messages()
    LOGGER.info("once")
    screen.stop_messages()
    assert capsys.readouterr().err == "once\n"


def test_json_is_valid_with_odd_numbers_and_letters(capsys):
    screen.as_json(
        {"a": float("nan"), "b": [float("inf"), 1.5], "c": "Bäume [x]", "d": {4: ("y",)}}
    )
    told = json.loads(capsys.readouterr().out)
    assert told == {"a": None, "b": [None, 1.5], "c": "Bäume [x]", "d": {"4": ["y"]}}


def test_long_lines_are_not_broken(capsys):
    screen.say("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_report_as_json():
    report = Report("T", ("s",), (Table("N", ("a",), (("1",),)),), provenance={"seed": 0})
    told = screen.report_as_json(report)
    assert told["tables"] == [{"title": "N", "header": ["a"], "rows": [["1"]]}]
    json.dumps(told)

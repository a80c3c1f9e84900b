"""How commands begin and end: help, usage errors, our errors, bugs and interrupts."""

import json
import os
import sys

import pytest

import dino_adapters
from dino_adapters.cli import judge, look, main
from dino_adapters.contracts import WeightsError

COMMANDS = (
    "doctor inspect start pretrain export embed fit evaluate report".split()  # noqa: SIM905
)


def test_help_lists_every_command_and_the_first_steps(run):
    result = run("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout
    assert "First steps" in result.stdout
    assert "dino-adapters start" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    if command != "doctor":
        assert f"dino-adapters {command}" in result.stdout, "help holds an example"


def test_no_words_show_the_help(run):
    assert "Step by step" in run().output


def test_version(run):
    assert run("--version").stdout.strip() == dino_adapters.__version__


@pytest.mark.parametrize(
    "words",
    [
        ("pretrian",),
        ("pretrain", "recipe.py", "--oot", "x"),
        ("pretrain",),
        ("embed", "vitmicro8", "photos"),
    ],
)
def test_usage_errors_end_with_2(run, words):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr
    assert not result.stdout


def test_our_errors_are_one_sentence_on_stderr(run, tmp_path):
    result = run("inspect", tmp_path / "nowhere")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error: There is no folder or table")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_our_errors_are_json_where_json_was_asked_for(run, tmp_path):
    result = run("inspect", tmp_path / "nowhere", "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["exit_code"] == 3
    assert found["error"].startswith("There is no folder or table")


def test_words_in_brackets_are_not_read_as_colours(run, tmp_path):
    result = run("inspect", tmp_path / "[red]nowhere[/red]")
    assert "[red]nowhere[/red]" in result.stderr


def test_unknown_settings_name_the_nearest_one(run, tmp_path):
    result = run("pretrain", "data.source=x", "optim.lrr=1e-3", "--out", tmp_path / "a")
    assert result.exit_code == 2
    assert "'optim.lrr'" in result.stderr
    assert "'optim.lr'" in result.stderr
    assert not (tmp_path / "a").exists()


def test_bugs_keep_their_traceback(run, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dino_adapters.data.open_source", broken)
    result = run("inspect", tmp_path)
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("command", "hint"), [("pretrain", "; continue with --resume."), ("report", "interrupted.")]
)
def test_interrupts_end_with_130_and_a_sentence(run, monkeypatch, tmp_path, command, hint):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dino_adapters.recipes.read.read_recipe", interrupted)
    monkeypatch.setattr("dino_adapters.study.runs.run_report", interrupted)
    words = [command, tmp_path / "a"] if command == "report" else [command, "r.py", "--out", "x"]
    result = run(*words)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.output


def test_exit_codes_come_from_the_error(run, monkeypatch, tmp_path):
    def refused(*args, **kwargs):
        raise WeightsError("These weights do not fit. Use others.")

    monkeypatch.setattr("dino_adapters.study.runs.run_report", refused)
    assert run("report", tmp_path).exit_code == WeightsError.exit_code == 4


def test_handlers_are_taken_off_again(run, tmp_path):
    import logging

    run("inspect", tmp_path / "nowhere")
    assert not logging.getLogger("dino_adapters").handlers


def test_calm_threads_are_defaults_and_the_user_wins(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dino-adapters", "--version"])
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert not ended.value.code
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["GOMP_SPINCOUNT"] == "0"


def test_every_option_is_read():
    """No dead flags: each parameter's name occurs in its command's body."""
    import ast
    import inspect

    from dino_adapters.cli import train

    commands = [look.doctor, look.inspect, look.embed, judge.fit, judge.evaluate, judge.report]
    for command in [*commands, train.start, train.pretrain, train.export]:
        tree = ast.parse(inspect.getsource(command)).body[0]
        assert isinstance(tree, ast.FunctionDef)
        body = {n.id for s in tree.body for n in ast.walk(s) if isinstance(n, ast.Name)}
        assert set(inspect.signature(command).parameters) <= body, command.__name__

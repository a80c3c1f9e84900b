"""Files stay short enough to be read in one go."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dino_adapters"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 350
MOST_CODE = 60


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{named(path)} has {lines} lines; split it by what it does"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        first = node.body[0]
        told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        start = node.body[1].lineno if told and len(node.body) > 1 else first.lineno
        lines = (node.end_lineno or start) - start + 1
        assert lines <= MOST_CODE, f"{named(path)}: {node.name} has {lines} lines of code"


def test_the_loop_is_one_file_under_300_lines():
    loop = PACKAGE / "pretrain" / "loop.py"
    assert len(loop.read_text(encoding="utf-8").splitlines()) < 300

"""What the documents point to is there, and nothing in them waits to be filled in."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("pretrain", "tasks", "benchmarks")
FILES = sorted([*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))])
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)"  # [text](target "title"), ![picture](target)
    r"|^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$"  # [name]: target
    r"""|<(?:img|a)\b[^>]*?\b(?:src|href)=["']([^"']+)""",
    re.MULTILINE,
)
ELSEWHERE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#")
PLACEHOLDER = re.compile(r"@[A-Z][A-Z0-9_]*@")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dead_links(text: str, folder: Path) -> list[str]:
    """Relative targets of links and pictures that are not there."""
    prose = CODE.sub("", FENCE.sub("", text))
    targets = [next(filter(None, groups)) for groups in LINK.findall(prose)]
    return [
        target
        for target in targets
        if not ELSEWHERE.match(target) and not (folder / unquote(target.split("#")[0])).exists()
    ]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_links_lead_somewhere(path):
    dead = dead_links(path.read_text(encoding="utf-8"), path.parent)
    assert not dead, f"{named(path)} links to {', '.join(dead)}, which is not there"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_waits_to_be_filled_in(path):
    left = PLACEHOLDER.findall(path.read_text(encoding="utf-8"))
    assert not left, f"{named(path)} still holds {', '.join(left)}"


def test_dead_links_are_found(tmp_path):
    """Otherwise the tests above would prove nothing."""
    (tmp_path / "here it is.md").write_text("")
    text = (
        "[a](gone.md) ![b](gone.png 'title') [c](here%20it%20is.md#part) [d](#part)\n"
        "[e](https://example.org/gone) <img src='gone.svg'> `[f](code.md)`\n"
        "```\n[g](fenced.md)\n```\n[h]: gone/too.md\n"
    )
    assert dead_links(text, tmp_path) == ["gone.md", "gone.png", "gone.svg", "gone/too.md"]


def test_the_documents_are_looked_at():
    assert {"README.md", "tasks/README.md"} <= {named(path) for path in FILES}

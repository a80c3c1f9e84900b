"""Why a file is no image, in the words of someone who looked: empty, a text, or cut off."""

from __future__ import annotations

import codecs
from pathlib import Path

_HEAD = 512
_TAIL = 64
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def find_damage(path: Path, error: str = "") -> str:
    """What is plainly wrong with a file that a decoder refused.

    Args:
        path: The file.
        error: What the decoder said.

    Returns:
        The rest of a sentence that begins with the file's name, e.g. `is empty (0 bytes)`; an
        empty text where nothing plain is wrong.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            head = opened.read(_HEAD)
            opened.seek(max(0, size - _TAIL))
            tail = opened.read(_TAIL)
    except OSError:
        return ""
    if size == 0:
        return "is empty (0 bytes)"
    if _is_cut(head, tail, size, error):
        return f"is cut off: its {size:,} bytes end before the image does"
    begins = _as_text(head)
    return f"is text, not an image (it begins {begins!r})" if begins else ""


def _is_cut(head: bytes, tail: bytes, size: int, error: str) -> bool:
    if head.startswith(b"\xff\xd8\xff"):  # JPEG; cameras may append things after its end mark
        return b"\xff\xd9" not in tail or "truncated" in error.lower()
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in tail
    if head.startswith((b"GIF87a", b"GIF89a")):
        return not tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"RIFF") and head[8:12] in (b"WEBP", b""):
        return int.from_bytes(head[4:8], "little") + 8 > size
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return int.from_bytes(head[2:6], "little") > size
    if head.startswith((b"II*\0", b"II+\0", b"MM\0*", b"MM\0+")):
        order = "little" if head.startswith(b"I") else "big"
        big = b"+" in head[:4]  # BigTIFF: the first directory's place has 8 bytes, not 4
        return int.from_bytes(head[8:16] if big else head[4:8], order) >= size
    return False


def _as_text(head: bytes) -> str:
    """The beginning of a text, at most 40 letters; an empty text if the bytes are none."""
    kind = "utf-16" if head.startswith(_UTF16) else "utf-8-sig"
    try:
        # Not final: the last letter may be cut in two.
        text = codecs.getincrementaldecoder(kind)().decode(head)
    except UnicodeDecodeError:
        return ""
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return ""
    return " ".join(text.split())[:40]


def problem_of(key: str, error: Exception) -> str:
    """A file and what is wrong with it, each said once, to stand in a list."""
    text = str(error).rstrip(".")
    return text if text.startswith(key) else f"{key}: {text}"

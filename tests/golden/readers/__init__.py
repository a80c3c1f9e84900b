"""One reader for each kind of golden case: it reads all of a case and checks every result.

A new reader is a file here with `read(case)`, and a line in `READERS`.
"""

from collections.abc import Callable

from ..case import Case
from . import convnext, rope, vit, vit_train_draws

READERS: dict[str, Callable[[Case], None]] = {
    "convnext": convnext.read,
    "rope": rope.read,
    "vit": vit.read,
    "vit_train_draws": vit_train_draws.read,
}

"""The device that work runs on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from dino_adapters.contracts import RecipeError

KNOWN = re.compile(r"cpu|mps|cuda(?::(\d{1,3}))?", re.ASCII)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; else the device as named.

    Other devices of torch (`meta`, `xla`, ...) are refused: nothing here was tried on them.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        RecipeError: the name is none of these, or the device is absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = KNOWN.fullmatch(name)
    if known is None:
        raise RecipeError(f"'{name}' is no device. Use auto, cpu, cuda, cuda:N or mps.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("'mps' was asked for, but torch finds no Apple GPU. Use auto or cpu.")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise RecipeError(f"'{name}' was asked for, but torch finds no GPU. Use auto or cpu.")
        count = torch.cuda.device_count()
        if int(known[1] or 0) >= count:
            raise RecipeError(
                f"'{name}' was asked for, but the last GPU is cuda:{count - 1}. Use that or a "
                "lower number."
            )
    return torch.device(name)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Makes training on a CPU repeat to the bit with several threads, too.

    Without it, gradients of indexed tensors are summed in the order in which threads finish, and a
    run of a hundred steps ends two points of accuracy apart from its own repetition. On other
    devices nothing is changed: not every operation there has a form that repeats.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # costs time and mends nothing here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filling

"""Randomness as a function of (seed, purpose, step, …), never of history.

A run that resumes, or that uses another number of workers, therefore draws the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed from the run's seed, a word for the purpose, and indices such as the step."""
    text = "/".join([str(seed), purpose, *(str(number) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU torch generator for this seed, purpose and indices."""
    import torch  # here: splits and draws of a data set do without it

    return torch.Generator().manual_seed(derive(seed, purpose, *numbers))


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A numpy generator for this seed, purpose and indices."""
    return np.random.default_rng(derive(seed, purpose, *numbers))

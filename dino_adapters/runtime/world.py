"""The device that work runs on."""

from __future__ import annotations

import torch

from dino_adapters.contracts import RecipeError


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; any torch device name is taken as it is.

    Raises:
        RecipeError: the name is no device, or CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"'{name}' is no device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"'{name}' was asked for, but torch finds no GPU. Use auto or cpu.")
    return device

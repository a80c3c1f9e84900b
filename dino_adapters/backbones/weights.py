"""Weight files into tensors, without ever running what a file brings along."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dino_adapters.backbones.catalog import RELEASED, Released, find_released
from dino_adapters.backbones.convert import strip_wrappers
from dino_adapters.contracts import WeightsError

DINOV3_LICENCE_ID = "dinov3-license"
"""As timm and the Hugging Face hub write it."""

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)

_META_NAME = re.compile(r"dinov3[-_](vit|convnext)[a-z0-9]*[-_]pretrain", re.IGNORECASE)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or pickled file, on the CPU.

    Raises:
        WeightsError: the file is absent, damaged, of another kind, or holds code.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file {path}. Check the path.")
    if path.suffix == ".safetensors":
        try:
            return strip_wrappers(load_file(path))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path.name} is damaged or no safetensors file ({error}). Fetch or save it again."
            ) from error
    if path.suffix not in PICKLED:
        raise WeightsError(f"{path.name} is of an unknown kind. Use one of {', '.join(SUFFIXES)}.")
    return strip_wrappers(_read_pickled(path))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of timm or transformers, in one file or in several parts.

    Raises:
        WeightsError: there are none, or a part is absent or damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors", "pytorch_model.bin"]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        tensors: dict[str, Tensor] = {}
        for name in names:
            # A part is named by a file from elsewhere: it must not lead out of the folder.
            tensors.update(read_tensors(folder / Path(name).name))
        return tensors
    for name in names:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise WeightsError(f"{folder} holds none of {', '.join(names)}. Name the folder with weights.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: the file is absent, damaged, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}). Fetch or save it again.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no JSON object. Fetch or save it again.")
    return found


def released_as(path: Path) -> Released | None:
    """Which file of the DINOv3 release this is: by the digits in its name, else by its content."""
    by_name = find_released(path)
    if by_name is not None or path.suffix not in PICKLED:
        return by_name
    with path.open("rb") as opened:
        return RELEASED.get(hashlib.file_digest(opened, "sha256").hexdigest()[:8])


def licence_of_name(name: str) -> str:
    """The licence that a name of the hub tells: Meta's DINOv3 networks are known, others not."""
    return DINOV3_LICENCE_ID if _META_NAME.search(name) else "unknown"


def _read_pickled(path: Path) -> Mapping[str, object]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the unpickler fail in any way (KeyError, …)
        if "GLOBAL" in str(error) or "global" in str(error):
            raise WeightsError(
                f"{path.name} holds Python objects beside tensors, and reading them could run "
                "code; it was not read. Ask for a .safetensors file, or for a plain state_dict."
            ) from error
        raise WeightsError(
            f"{path.name} is damaged or no PyTorch checkpoint. Fetch or save it again."
        ) from error
    if not isinstance(found, Mapping):
        raise WeightsError(
            f"{path.name} holds a {type(found).__name__}, and a dict of tensors was expected. Save "
            "the network's state_dict."
        )
    return found

"""What lies in a checkpoint's folder, read without trusting it: nothing in it is executed."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dino_adapters.contracts import CheckpointError
from dino_adapters.runtime.files import file_digest, json_digest

META, INDEX = "meta.json", ".metadata"
FORMAT, SHOWN = 1, 3
STEP = re.compile(r"step_(\d{8,})", re.ASCII)


def steps(folder: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, oldest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("*") if (match := STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def seal(path: Path) -> list[Any]:
    """Bytes and digest of a file."""
    return [path.stat().st_size, file_digest(path)]


class _Fault(Exception):
    """What is wrong with a checkpoint, as half a sentence."""


def read_meta(path: Path) -> dict[str, Any]:
    """The content of meta.json, which holds its own digest, too.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    try:
        return _meta(path)
    except _Fault as error:
        raise _refusal(path, error) from error


def read_index(path: Path) -> Metadata:
    """Where each piece of each tensor lies.

    Raises:
        CheckpointError: it is missing, damaged, or holds anything but tensors of this checkpoint.
    """
    try:
        files = _meta(path)["files"]
        if seal(path / INDEX) != files[INDEX]:
            raise _Fault(f"{INDEX} is not as it was written")
        with (path / INDEX).open("rb") as opened:
            index = _Unpickler(opened).load()
        _check_index(index, files)
    except _Fault as error:
        raise _refusal(path, error) from error
    except Exception as error:  # a pickle can be broken in any way
        raise _refusal(path, f"{INDEX} cannot be read ({type(error).__name__})") from error
    return index


def _refusal(path: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} cannot be used: {why}. Remove that folder to go on from the one "
        "before it."
    )


def _meta(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / META).read_text(encoding="utf-8"))
        version, digest = content.get("format"), content.pop("digest", None)
        whole = digest == json_digest(content)
    except FileNotFoundError:
        raise _Fault(f"{META} is missing") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _Fault(f"{META} cannot be read ({type(error).__name__})") from error
    if version != FORMAT:
        raise _Fault(f"{META} is of format {version}, and this version reads {FORMAT}")
    if not whole:
        raise _Fault(f"{META} is not as it was written")
    return content


def fault(path: Path, *, share: tuple[int, int] = (0, 1), quick: bool = False) -> str | None:
    """What is wrong with a checkpoint, if anything.

    Args:
        path: the checkpoint.
        share: rank and number of the processes that divide the files among them.
        quick: look at sizes alone.
    """
    try:
        files = _meta(path)["files"]
        for name, (size, _) in files.items():
            if Path(name).name != name:
                return f"{META} lists {name}, which is elsewhere"
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, and {size} were written"
        for name in () if quick else sorted(files)[share[0] :: share[1]]:
            if file_digest(path / name) != files[name][1]:
                return f"{name} is not as it was written"
    except _Fault as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror or error})"
    return None


class _Properties(TensorProperties):
    """Of a tensor, its dtype alone: the rest is deprecated, and torch's versions differ in it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if not isinstance(state[0], torch.dtype):
            raise _Fault(f"{INDEX} holds a tensor of {state[0]}, which is no dtype")
        self.__init__(state[0])


class _Place:
    """A piece of a file, as torch's reader asks for it: file, offset and length."""

    transform_descriptors = None


def _ignored(*_: Any) -> None:
    """Stands for what says how a tensor lay in memory."""


DCP = "torch.distributed.checkpoint"
RECORDS = {
    (f"{DCP}.metadata", "Metadata"): Metadata,
    (f"{DCP}.metadata", "MetadataIndex"): MetadataIndex,
    (f"{DCP}.metadata", "StorageMeta"): StorageMeta,
    (f"{DCP}.metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    (f"{DCP}.metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    (f"{DCP}.metadata", "TensorProperties"): _Properties,
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"): _ignored,
    (f"{DCP}.filesystem", "_StorageInfo"): _Place,
    ("torch.serialization", "_get_layout"): _ignored,
    ("builtins", "getattr"): _ignored,  # early releases of Python 3.11 wrote enumerations by it
    ("torch", "Size"): torch.Size,
}
"""All that an index names beside dtypes, and what is built instead; nothing private to torch."""


class _Unpickler(pickle.Unpickler):
    """Builds the records of an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECORDS:
            return RECORDS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Fault(f"{INDEX} names {module}.{name}, which no checkpoint does")


def _check_index(index: Metadata, files: Collection[str]) -> None:
    """Every tensor must be there in whole, in files that were digested."""
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise _Fault(f"{INDEX} holds {name}, which is no tensor")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise _Fault(f"{INDEX} does not hold all of {name}")
        for chunk in entry.chunks:
            place = index.storage_data[MetadataIndex(name, chunk.offsets)]
            # What a transform is called decides which code undoes it; we write none.
            if place.relative_path not in files or place.transform_descriptors:
                raise _Fault(f"{INDEX} takes {name} from elsewhere ({place.relative_path})")


def differences(index: Metadata, tensors: Mapping[str, Tensor], without: tuple[str, ...]) -> str:
    """What keeps an index from fitting tensors, the first few of each kind; empty if nothing."""
    stored = {
        name: _look(entry.properties.dtype, entry.size)
        for name, entry in cast(dict[str, Any], index.state_dict_metadata).items()
        if not name.startswith(without)
    }
    here = {
        name: "no memory" if tensor.is_meta else _look(tensor.dtype, tensor.shape)
        for name, tensor in tensors.items()
    }
    others = [
        f"{name} ({stored[name]} there, {look} here)"
        for name, look in sorted(here.items())
        if stored.get(name, look) != look
    ]
    kinds = {
        "lacks": sorted(here.keys() - stored.keys()),
        "holds besides": sorted(stored.keys() - here.keys()),
        "differs in": others,
    }
    return "; ".join(f"it {verb} {_first(found)}" for verb, found in kinds.items() if found)


def _first(found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _look(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


class Reader(FileSystemReader):
    """Reads tensors by an index that was checked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.folder = path
        self.index = Metadata({})

    def check(
        self, tensors: Mapping[str, Tensor], without: tuple[str, ...], share: tuple[int, int]
    ) -> None:
        """Makes sure that everything can be loaded; `share` is as for `fault`.

        Raises:
            CheckpointError: it is damaged, or of other networks.
        """
        if found := fault(self.folder, share=share):
            raise _refusal(self.folder, found)
        self.index = read_index(self.folder)
        if found := differences(self.index, tensors, without):
            raise CheckpointError(
                f"The checkpoint {self.folder} is of another run: {found}. Keep networks, heads "
                "and optimiser groups as they were, or start anew."
            )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index as it was checked: torch's own way would execute what the file says."""
        return self.index


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors alone."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def load_bytes(self, read_item: Any, value: Any) -> NoReturn:
        """Refused: torch's own way would execute what they say."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor")

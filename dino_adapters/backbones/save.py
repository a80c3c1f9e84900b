"""Export folders that this package, timm and transformers each open unchanged.

model.safetensors   tensors by our names        timm/           config.json, model.safetensors
card.json           `BackboneInfo`, formats     transformers/   the same, and the preprocessor
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.backbones.bands import UNTRAINED
from dino_adapters.backbones.card import CARD, WEIGHTS, card_of, digest_of, plain
from dino_adapters.backbones.catalog import DINOV3_LICENCE_NOTE
from dino_adapters.backbones.convnext import ConvNeXt
from dino_adapters.backbones.foreign import TimmNetwork, create_timm
from dino_adapters.backbones.layouts import Layout, foreign_layout, timm_layout, transformers_layout
from dino_adapters.backbones.vit import VisionTransformer
from dino_adapters.backbones.weights import DINOV3_LICENCE_ID
from dino_adapters.contracts import BackboneInfo, RunFolderError, WeightsError
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.files import (
    needs_room,
    replace_folder,
    write_json,
    write_tensors,
    write_text,
)

LICENCE_FILE = "LICENCE-NOTE.txt"
FULL_ADVICE = (
    "Make room, and repeat the command; training goes on with --resume. Earlier exports and saved "
    "states are whole."
)


def export_backbone(
    network: nn.Module,
    info: BackboneInfo,
    folder: Path,
    *,
    overwrite: bool = False,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Writes a backbone for use elsewhere; all of it or nothing.

    Weights are stored in float32, and `load_backbone(folder)` gives equal outputs. The digest and
    the architecture in the card are those of the network as it is now, whatever `info` says.

    Args:
        network: One of ours or a `TimmNetwork`; a compiled one is unwrapped.
        info: Of the network. Whoever trained new bands empties `untrained_bands`.
        folder: To be made; its parent may be absent too.
        overwrite: Replace an earlier export that stands there.
        beside: Further safetensors files to write into the folder, tensors by file name.

    Returns:
        The folder.

    Raises:
        RunFolderError: the folder exists, or holds something that is no export.
        DiskFullError: there is no room; nothing of it is left, and an earlier export is whole.
        WeightsError: a network of an unknown kind, or one that its name does not rebuild.
    """
    notices = Notices()
    folder = Path(folder)
    _refuse_existing(folder, overwrite)
    network = _as_float32(getattr(network, "_orig_mod", network))
    state = {key.replace("_orig_mod.", ""): tensor for key, tensor in network.state_dict().items()}
    layouts: dict[str, Layout]
    if isinstance(network, VisionTransformer | ConvNeXt):
        info = dataclasses.replace(info, architecture=plain(dataclasses.asdict(network.config)))
        layouts = {
            "timm": timm_layout(network.config, state, info),
            "transformers": transformers_layout(network.config, state, info),
        }
    elif isinstance(network, TimmNetwork):
        _check_rebuilds(network)
        named = {"timm": network.name, "arguments": plain(network.arguments)}
        info = dataclasses.replace(info, architecture=named)
        reason = "it is a network of timm; transformers opens it through its own timm wrapper"
        layouts = {"timm": foreign_layout(network, info), "transformers": Layout(why_not=reason)}
    else:
        raise WeightsError(
            f"A {type(network).__name__} cannot be exported. Give a network that build_network "
            "made, or unwrap it first."
        )
    info = dataclasses.replace(info, digest=digest_of(network, info))
    if info.untrained_bands:
        notices.add(UNTRAINED, f"exported as {folder.name}: {', '.join(info.untrained_bands)}")
    if info.licence == DINOV3_LICENCE_ID:
        notices.add(DINOV3_LICENCE_NOTE, f"exported as {folder.name}")
    beside = beside or {}
    files = [state, *(layout.tensors for layout in layouts.values()), *beside.values()]
    with needs_room(f"The export {folder}", folder, _bytes(files), FULL_ADVICE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(temporary, state, info, layouts)
            for name, tensors in beside.items():
                _save(temporary / name, tensors)
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _bytes(files: Iterable[Mapping[str, Tensor]]) -> int:
    """Bytes that the tensors take on the disk."""
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise RunFolderError(
            f"{folder} exists already. Name another folder, or replace it with overwrite=True."
        )
    if not (folder / CARD).is_file():
        raise RunFolderError(
            f"{folder} holds files but no exported backbone, so it is left alone. Name another "
            "folder."
        )


def _as_float32(network: nn.Module) -> nn.Module:
    tensors = [*network.parameters(), *network.buffers()]
    if all(t.dtype == torch.float32 or not t.is_floating_point() for t in tensors):
        return network
    return copy.deepcopy(network).float()


def _check_rebuilds(network: TimmNetwork) -> None:
    """A module may have been given with a name that does not tell how it was built."""
    try:
        with torch.device("meta"):
            again = create_timm(network.name, arguments=network.arguments).model.state_dict()
        problem = None
    except TypeError as error:
        again, problem = {}, str(error)
    own = network.model.state_dict()
    if {k: t.shape for k, t in again.items()} != {k: t.shape for k, t in own.items()}:
        raise WeightsError(
            f"timm's '{network.name}' with {network.arguments} is not this network"
            f"{f' ({problem})' if problem else ''}, so nobody could load the export. Make it with "
            "build_network(name, architecture={…}), or TimmNetwork(…, arguments={…})."
        )


def _write(
    folder: Path, state: Mapping[str, Tensor], info: BackboneInfo, layouts: Mapping[str, Layout]
) -> None:
    # mkdtemp makes folders private to their owner; an export follows the user's umask instead.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    _save(folder / WEIGHTS, state)
    for name, layout in layouts.items():
        if layout.why_not is not None:
            continue
        _save(folder / name / WEIGHTS, layout.tensors)
        write_json(folder / name / "config.json", plain(layout.config))
        if layout.preprocessor is not None:
            write_json(folder / name / "preprocessor_config.json", dict(layout.preprocessor))
    if info.licence == DINOV3_LICENCE_ID:
        write_text(folder / LICENCE_FILE, DINOV3_LICENCE_NOTE + "\n")
    said: dict[str, Any] = {name: layout.said() for name, layout in layouts.items()}
    write_json(folder / CARD, card_of(info, said))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    # Copies: safetensors refuses tensors that share memory, and parts of a larger one.
    ready = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_tensors(path, ready, {"format": "pt"})  # transformers asks for this word

"""Is this still the same run? A resumed run must see the same settings, images and start."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_adapters.contracts import BackboneInfo, CheckpointError
from dino_adapters.data.metadata import Metadata
from dino_adapters.pretrain.guides import targets_of
from dino_adapters.pretrain.intake import Intake
from dino_adapters.runtime.files import json_digest, write_json
from dino_adapters.runtime.runfolder import RunFolder

LOGGER = logging.getLogger(__name__)
FREE = frozenset(
    {
        "data.workers",
        "data.memory_gb",
        "device",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "guard.most_skipped",
        "guard.save",
        "monitor.tensorboard",
        "parallel.micro_batch",
        "parallel.sharding",
    }
)
"""What may change without asking: how images are read, how a step is divided (up to rounding, and
to the draws of drop path and rotary positions), and what is kept. None of it decides the result."""
SHOWN = 6
PHASE = re.compile(r"^phases\.\d+\.")


def describe_inputs(
    intake: Intake,
    info: BackboneInfo,
    groups: Mapping[str, str],
    metadata: Metadata | None = None,
) -> dict[str, Any]:
    """What a run was fed beside its recipe: number of images, and a digest of all that counts."""
    content = {
        "keys": list(intake.keys),
        "groups": [groups.get(key) for key in intake.keys],
        "bands": [[band.name, band.low, band.high] for band in intake.bands],
        "side": intake.side,
        "mean": list(info.mean),
        "std": list(info.std),
        "start": info.digest,
    }
    if metadata is not None:
        targets = targets_of(metadata, range(len(metadata.keys)))
        # Texts, as missing numbers are NaN.
        content["metadata"] = {name: str(values.tolist()) for name, values in targets.items()}
    return {"images": len(intake.keys), "digest": json_digest(content)}


def check_same_run(
    folder: RunFolder, asked: dict[str, Any], recipe: dict[str, Any], *, accept: bool = False
) -> None:
    """Refuses to continue a run under another recipe.

    Args:
        folder: of the run.
        asked: what it is told now.
        recipe: the same, settled.
        accept: write it down and go on, saying what changed.

    Raises:
        CheckpointError: with the settings that differ.
    """
    before = flatten(json.loads(folder.asked_file.read_text(encoding="utf-8")))
    now = flatten(asked)
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if PHASE.sub("", key) not in FREE and before.get(key) != now.get(key)
    ]
    if changed and not accept:
        raise CheckpointError(
            f"{folder.path} holds a run with other settings ({'; '.join(changed[:SHOWN])}"
            f"{'; …' if len(changed) > SHOWN else ''}). Use the same recipe to continue it, name "
            "another folder with --out, or go on all the same with --accept-changes."
        )
    if changed:
        LOGGER.warning("This run goes on with other settings: %s.", "; ".join(changed))
        before = len(list(folder.path.glob("recipe_before_*.json")))
        shutil.copyfile(folder.recipe_file, folder.path / f"recipe_before_{before + 1}.json")
        write_json(folder.asked_file, asked)
        write_json(folder.recipe_file, recipe)


def check_same_inputs(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to continue a run on other images or from other start weights.

    Raises:
        CheckpointError: with the number of images then and now.
    """
    if before["digest"] != now["digest"]:
        raise CheckpointError(
            f"The images or the start weights are not those that {checkpoint} was trained on "
            f"({before['images']} images then, {now['images']} now). Bring the same images "
            "back to continue, or start anew with another --out."
        )


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c` -> value; entries of a list of tables by their number."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{path}.{key}" if path else key)
    return flat

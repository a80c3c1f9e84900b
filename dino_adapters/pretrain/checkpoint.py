"""Training states: saved whole or not at all, read without executing code."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino_adapters.contracts import CheckpointError
from dino_adapters.pretrain.learner import Learner
from dino_adapters.runtime.files import replace_folder, write_json

STATE, META = "state.pt", "meta.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: steps done, and seconds of training spent on them."""

    step: int
    seconds: float


def save_checkpoint(
    folder: Path,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    inputs: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `step_NNNNNNNN/` and removes all but the last `keep`.

    Randomness and the order of images are functions of the step, so weights, optimiser and two
    numbers are the whole state. `inputs` tells what the run was fed (`resume.describe_inputs`).
    """
    target = folder / f"step_{progress.step:08d}"
    partial = folder / f".{target.name}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {
        "step": progress.step,
        "seconds": progress.seconds,
        "learner": learner.state(),
        "optimizer": optimizer.state_dict(),
    }
    try:
        torch.save(state, partial / STATE)
        write_json(partial / META, {"step": progress.step, "inputs": inputs})
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{META}"))


def fed(path: Path) -> dict[str, Any]:
    """What the run of a checkpoint was fed, and the precision it was settled on."""
    return json.loads((path / META).read_text(encoding="utf-8"))["inputs"]


def load_checkpoint(path: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> Progress:
    """Restores everything in place.

    Raises:
        CheckpointError: the file is damaged, or of a run with other networks.
    """
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        learner.load_state(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be restored ({type(error).__name__}). Remove that "
            "folder to go on from the one before it, or start anew with --overwrite."
        ) from error
    return Progress(int(state["step"]), float(state["seconds"]))


def take_over(learner: Learner, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Starts a phase from the whole state of the one before: networks, centres and optimiser.

    Its Gram teacher stays behind: the new phase says itself where it takes its own from.

    Raises:
        CheckpointError: the file is damaged, or of other networks.
    """
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        learner.load_state({k: v for k, v in state["learner"].items() if k != "gram"})
        # Moments only: betas and multipliers of the groups are those of the new phase.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
    except Exception as error:
        raise CheckpointError(
            f"The state {path} of the phase before cannot be taken over ({type(error).__name__}). "
            "Keep network, heads and optimiser groups as they were, or set start='teacher'."
        ) from error

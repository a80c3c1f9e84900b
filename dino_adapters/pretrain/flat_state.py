"""Nested states and optimisers as tensors by name, which is what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.contracts import CheckpointError
from dino_adapters.pretrain.checkpoint_files import read_index

OPTIMIZER, STEPS = "optimizer/", "step"


def flatten(state: Mapping[str, Any], path: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A nested state as tensors and plain values by joined name `a/b/c`.

    Raises:
        CheckpointError: a key is no text or holds a slash.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(key, str) or "/" in key:
            raise CheckpointError(
                f"The state has the key {key!r}, and names in a checkpoint are texts without a "
                "slash. Rename it."
            )
        if isinstance(value, Tensor):
            tensors[path + key] = value
        elif isinstance(value, Mapping) and value:
            below = flatten(value, f"{path}{key}/")
            tensors, numbers = tensors | below[0], numbers | below[1]
        else:  # an empty mapping stays one
            numbers[path + key] = value
    return tensors, numbers


def unflatten(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The nested state of `flatten`."""
    state: dict[str, Any] = {}
    for name, value in {**tensors, **numbers}.items():
        *places, key = name.split("/")
        inner = state
        for place in places:
            inner = inner.setdefault(place, {})
        inner[key] = value
    return state


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """Tensors of an optimiser's state, `optimizer/NAME/exp_avg`; a DTensor where the parameter is.

    Parameters without a gradient so far have no state, and nothing here.

    Raises:
        CheckpointError: a parameter with a state has no name, or a state is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    named = 0
    for name, parameter in named_parameters:
        state = optimizer.state.get(parameter, {})
        named += bool(state)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"The optimiser keeps {key} of {name} as {type(value).__name__}, and a "
                    "checkpoint holds tensors. Use AdamW."
                )
            tensors[f"{OPTIMIZER}{name}/{key}"] = value
    if held := sum(bool(state) for state in optimizer.state.values()) - named:
        raise CheckpointError(
            f"The optimiser keeps a state of {held} parameters that have no name here. Name every "
            "parameter that it moves, once."
        )
    return tensors


def blank_optimizer(
    path: Path, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """Zeros for all that a checkpoint has of an optimiser.

    `load` fills them, and `restore_optimizer` takes them over.

    Args:
        path: the checkpoint.
        named_parameters: as for `flatten_optimizer`; sharded as they are now.

    Raises:
        CheckpointError: its index is missing or damaged.
    """
    parameters = dict(named_parameters)
    tensors: dict[str, Tensor] = {}
    for full in sorted(read_index(path).state_dict_metadata):
        name, _, key = full.removeprefix(OPTIMIZER).rpartition("/")
        if full.startswith(OPTIMIZER) and name in parameters:
            like = parameters[name]
            # AdamW counts the steps of each parameter in a float of its own.
            tensors[full] = torch.zeros(()) if key == STEPS else torch.zeros_like(like)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Gives an optimiser the state of `flatten_optimizer`; rates, betas and groups stay.

    A parameter without a state there has none afterwards, as before its first gradient.

    Args:
        optimizer: AdamW.
        named_parameters: as for `flatten_optimizer`.
        tensors: its names may be among others; these tensors are taken over, not copied.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        if full.startswith(OPTIMIZER):
            name, _, key = full.removeprefix(OPTIMIZER).rpartition("/")
            found.setdefault(name, {})[key] = tensor
    on_device = {
        parameter
        for group in optimizer.param_groups
        if group.get("capturable") or group.get("fused")
        for parameter in group["params"]
    }
    for name, parameter in named_parameters:
        optimizer.state.pop(parameter, None)
        if name in found:
            state = found[name]
            if parameter in on_device:  # all in one kernel there, the count of steps, too
                state[STEPS] = state[STEPS].to(parameter.device)
            optimizer.state[parameter] = state

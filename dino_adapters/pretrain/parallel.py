"""Several devices: gradients averaged (DDP), or the whole state divided (FSDP2).

Started by torchrun, every process computes its share of each batch. With `sharding="none"` each
holds everything, and gradients are averaged once a step, after the last micro-batch. With `"full"`
torch's `fully_shard` divides weights, gradients, moments and averages, and gathers one block at a
time.

Gradients are averaged by our own few lines and not by torch's DistributedDataParallel: its wrapper
wants one forward pass a step, all parameters in use and none that thaws later, and a step here has
several networks, micro-batches and a backbone that is frozen first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_adapters.backbones.lora import merged
from dino_adapters.pretrain.learner import Learner
from dino_adapters.pretrain.objective import Losses
from dino_adapters.runtime.world import World

BUCKET = 25 * 2**20
"""Bytes that travel together."""
BLOCKS = ("blocks", "stages")
WAYS_IN = ("forward_crops", "total", "losses")
"""Methods of networks, and of guides, that use weights as `forward` does."""


def shard_networks(learner: Learner, world: World) -> None:
    """Divides every network of a method over the processes, block by block.

    A process group must run (`World.grouped`); one of a single process will do.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(learner.device.type, (world.size,))
    for networks in learner.networks().values():
        # Weights in the channels-last layout cannot be divided.
        backbone = networks["backbone"].to(memory_format=torch.contiguous_format)
        # Features are views of tokens, and nothing here changes them in place.
        kind = rf"\(FSDP{type(backbone).__name__}\)"
        warnings.filterwarnings("ignore", message=f"FSDP2-wrapped module {kind} returned a view")
        for block in blocks_of(backbone):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for module in networks.values():
            # Said outright: a root would else stay whole after the forward pass of a teacher.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            # What a step calls beside forward, which is all that is watched by itself.
            for name in WAYS_IN:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: entries of lists called blocks or stages, inner before outer.

    torch divides what is left of a module once its parts are divided, and refuses the other order.
    Entries that are mere lists are never called, so that theirs are taken in their place.
    """
    found: dict[nn.Module, None] = {}  # a set in order: a list within a list is met twice
    for name, module in reversed(list(backbone.named_modules())):
        if name.rpartition(".")[2] in BLOCKS and isinstance(module, nn.ModuleList | nn.Sequential):
            entries = list(module)
            while any(isinstance(entry, nn.ModuleList) for entry in entries):
                entries = [
                    inner
                    for entry in entries
                    for inner in (entry if isinstance(entry, nn.ModuleList) else [entry])
                ]
            found |= dict.fromkeys(entries)
    return list(found)


def average_gradients(modules: Iterable[nn.Module], world: World) -> None:
    """Replaces gradients by their mean over the processes; divided ones are that already."""
    if world.size == 1:
        return
    found = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    whole = [gradient for gradient in found if not hasattr(gradient, "to_local")]
    for bucket in buckets(whole):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world.size
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def average_losses(losses: Losses, world: World) -> Losses:
    """Losses of the whole batch, from those of each process's share; not finite if one is not."""
    if world.size == 1:
        return losses
    values = torch.stack([losses.total, *losses.terms.values()])
    dist.all_reduce(values)
    total, *terms = values / world.size
    return Losses(total, dict(zip(losses.terms, terms, strict=True)))


def buckets(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Gradients in order, as many together as fit into a bucket, at least one."""
    found: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if not found or size > room or found[-1][0].dtype != gradient.dtype:
            found.append([])
            room = BUCKET
        found[-1].append(gradient)
        room -= size
    return found


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of divided ones; every process must ask."""
    return {
        name: cast(Any, value).full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in tensors.items()
    }


def in_one_piece(networks: nn.ModuleDict, whole: nn.ModuleDict | None) -> nn.ModuleDict:
    """An average as it is delivered: undivided, adapters merged into the weights, in eval mode.

    Args:
        networks: backbone and heads; every process must ask.
        whole: the same networks undivided, or None where these are.

    Returns:
        The networks themselves where they are plain already.
    """
    if whole is not None:
        networks, state = copy.deepcopy(whole), gathered(networks.state_dict())
        networks.load_state_dict(state)
    parts = {name: merged(part) if name == "backbone" else part for name, part in networks.items()}
    return nn.ModuleDict(parts).eval()


def divide(total: int, world: World) -> range:
    """The places of a batch that this process works on."""
    each = total // world.size
    return range(world.rank * each, (world.rank + 1) * each)

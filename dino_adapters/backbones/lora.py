"""Low-rank adapters beside the linear layers of a transformer's blocks (LoRA, arXiv 2106.09685).

With the last block open and all norms trained this is the shape of ExPLoRA (arXiv 2406.10973).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_adapters.backbones.blocks import KeyMaskedLinear
from dino_adapters.backbones.foreign import TimmNetwork
from dino_adapters.backbones.stem import stem_of
from dino_adapters.contracts import RecipeError, WeightsError
from dino_adapters.runtime.chance import generator
from dino_adapters.runtime.lookup import nearest


class AdaptedLinear(nn.Linear):
    """A linear layer plus `alpha / rank * B A`; never built, only made of one that is there.

    The change is computed beside the layer and never added to the weight: with a weight of their
    sum, training would have to compute a gradient as large as the weight in every step.

    Attributes:
        lora_a: A, `(rank, in)`.
        lora_b: B, `(out, rank)`.
        lora_factor: `alpha / rank`.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_factor: float

    def forward(self, input: Tensor) -> Tensor:
        """The layer's own output plus that of the adapter."""
        change = F.linear(F.linear(input, self.lora_a) * self.lora_factor, self.lora_b)
        return super().forward(input) + change


class AdaptedKeyMaskedLinear(AdaptedLinear, KeyMaskedLinear):
    """The same beside a `KeyMaskedLinear`, whose `forward` is next in line."""


ADAPTED: dict[type[nn.Linear], type[AdaptedLinear]] = {
    nn.Linear: AdaptedLinear,
    KeyMaskedLinear: AdaptedKeyMaskedLinear,
}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


@dataclass(frozen=True, slots=True)
class LoraSummary:
    """What `add_lora` did.

    Attributes:
        trained: Parameters that are trained, adapters included.
        parameters: All parameters, adapters included.
        layers: Linear layers with an adapter.
    """

    trained: int
    parameters: int
    layers: int

    def sentence(self) -> str:
        """For the log, without a full stop."""
        share = self.trained / self.parameters
        return (
            f"{self.layers} linear layers have adapters; {self.trained:,} of "
            f"{self.parameters:,} parameters are trained ({share:.1%})"
        )


def add_lora(
    network: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    open_blocks: int,
    norms: bool,
    seed: int,
    open_stem: bool = False,
) -> LoraSummary:
    """Adds adapters in place, and freezes what is not trained beside them.

    Base weights keep their names (`blocks.0.attn.qkv.weight`); adapters stand beside them
    (`blocks.0.attn.qkv.lora_a`, `lora_b`). B starts at 0, so that outputs stay equal to the bit.

    Args:
        network: A `VisionTransformer`, or a transformer of timm in a `TimmNetwork`.
        rank: Rank of the change that an adapter can make to a weight, at least 1.
        alpha: The change is multiplied by `alpha / rank`.
        targets: Last parts of the names of linear layers in a block (`qkv`, `proj`, `fc1`, `fc2`).
        open_blocks: The last so many blocks are trained whole, and get no adapters.
        norms: Train all norms and gains, too.
        seed: A follows from it alone.
        open_stem: Train the layer that reads the pixels, for bands that the weights never saw.

    Raises:
        RecipeError: there is nothing to adapt, a target is unknown, or adapters are there already.
        WeightsError: `open_stem`, and no single convolution reads the pixels.
    """
    name = _name(network)
    if has_lora(network):
        raise RecipeError(
            f"{name} has adapters already, and a second set would act on top of them. Call merged "
            "on it first, or load its weights anew."
        )
    blocks = _blocks(network)
    if open_blocks >= len(blocks):
        raise RecipeError(
            f"open_blocks is {open_blocks} and {name} has {len(blocks)} blocks, so that none is "
            "left to adapt. Open fewer blocks, or train without adapters."
        )
    closed = blocks[: len(blocks) - open_blocks]
    layers = _chosen(closed, targets, name)
    opened: list[nn.Module] = [*blocks[len(closed) :], *([stem_of(network)] if open_stem else [])]
    network.requires_grad_(False)
    for module in opened:
        module.requires_grad_(True)
    if norms:
        for parameter in _gains(network):
            parameter.requires_grad_(True)
    chance = generator(seed, "lora")
    for layer in layers:
        _adapt(layer, rank, alpha / rank, chance)
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return LoraSummary(trained, sum(p.numel() for p in parameters), len(layers))


def has_lora(network: nn.Module) -> bool:
    """Whether any layer has an adapter."""
    return any(isinstance(module, AdaptedLinear) for module in network.modules())


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """A copy whose adapters went into the weights: plain classes, plain keys, same outputs.

    Outputs agree up to the rounding of the weights' dtype. What is frozen stays frozen.

    Returns:
        The copy, or the network itself where there are no adapters.
    """
    if not has_lora(network):
        return network
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, AdaptedLinear):
            wide = torch.promote_types(module.weight.dtype, torch.float32)
            change = module.lora_factor * (module.lora_b.to(wide) @ module.lora_a.to(wide))
            module.weight.copy_(module.weight.to(wide) + change)
            del module.lora_a, module.lora_b, module.lora_factor
            _turn(module, PLAIN[type(module)])
    return plain


@torch.no_grad()
def share_frozen(average: nn.Module, student: nn.Module) -> int:
    """Lets a moving average hold the student's own tensors wherever the student is frozen.

    For weights that stay frozen, and once both networks are built: a copy of either separates them
    again. What moves is averaged adapter by adapter, A and B each by itself, and not as merged
    weights. That is a choice: the average of products `B A` would have no low rank, and would need
    a set of full weights. Both agree where the average lies close to the student.

    Args:
        average: A copy of the student.
        student: With `requires_grad` False on what is frozen.

    Returns:
        Bytes saved.

    Raises:
        WeightsError: the average lacks a frozen tensor of the student, or holds other values.
    """
    saved = 0
    there = dict(average.named_parameters())
    frozen = [(name, p) for name, p in student.named_parameters() if not p.requires_grad]
    for name, parameter in frozen:
        if name not in there or not torch.equal(there[name], parameter):
            raise WeightsError(
                f"'{name}' is frozen in the student, and the average holds "
                f"{'other values' if name in there else 'none of that name'}. Make the average a "
                "copy of the student before they share it."
            )
    for name, parameter in frozen:
        if there[name] is not parameter:
            holder, _, leaf = name.rpartition(".")
            setattr(average.get_submodule(holder), leaf, parameter)
            saved += parameter.numel() * parameter.element_size()
    return saved


def _name(network: nn.Module) -> str:
    return network.name if isinstance(network, TimmNetwork) else type(network).__name__


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Blocks, in order."""
    inner = network.model if isinstance(network, TimmNetwork) else network
    blocks = getattr(inner, "blocks", None)
    # Some CNNs call their stages blocks; these hold convolutions alone.
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not any(
        type(module) in ADAPTED for module in blocks.modules()
    ):
        raise RecipeError(
            f"{_name(network)} has no blocks with linear layers, where adapters go. Take a vision "
            "transformer, or train without adapters."
        )
    return list(blocks)


def _chosen(blocks: Sequence[nn.Module], targets: Sequence[str], name: str) -> list[nn.Linear]:
    """Linear layers that get an adapter, in network order."""
    found: list[tuple[str, nn.Module, nn.Linear]] = []
    for block in blocks:
        for path, layer in block.named_modules():
            if type(layer) in ADAPTED:
                assert isinstance(layer, nn.Linear)
                holder, _, leaf = path.rpartition(".")
                found.append((leaf, block.get_submodule(holder), layer))
    for target in targets:
        holders = [holder for leaf, holder, _ in found if leaf == target]
        if not holders:
            raise RecipeError(
                f"The blocks of {name} have no linear layer called '{target}'. "
                f"{nearest(target, {leaf for leaf, _, _ in found})}"
            )
        # timm's BEiT and EVA: with a bias for q and v alone the attention reads the weight itself.
        if target == "qkv" and any(
            getattr(holder, "q_bias", None) is not None
            and not getattr(holder, "qkv_bias_separate", False)
            for holder in holders
        ):
            raise RecipeError(
                f"{name} reads the weight of its layer 'qkv' past the layer, so that an adapter "
                "there would do nothing. Take other targets, such as proj, fc1 and fc2."
            )
    return [layer for leaf, _, layer in found if leaf in targets]


def _gains(network: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of norms, and gains per channel: `gamma`, or `gamma_1` where a block holds it."""
    for module in network.modules():
        norm = "norm" in type(module).__name__.lower()  # timm has its own, of no common class
        for name, parameter in module.named_parameters(recurse=False):
            if norm or name.startswith("gamma"):
                yield parameter


@torch.no_grad()
def _adapt(layer: nn.Linear, rank: int, factor: float, chance: torch.Generator) -> None:
    """Turns a linear layer into one with an adapter; A is uniform in ±1 / sqrt(in)."""
    weight = layer.weight
    bound = 1.0 / math.sqrt(layer.in_features)
    down = torch.empty(rank, layer.in_features, device="cpu").uniform_(
        -bound, bound, generator=chance
    )
    _turn(layer, ADAPTED[type(layer)])
    assert isinstance(layer, AdaptedLinear)
    layer.lora_a = nn.Parameter(down.to(weight))
    layer.lora_b = nn.Parameter(weight.new_zeros(layer.out_features, rank))
    layer.lora_factor = factor


def _turn(layer: nn.Linear, kind: type[nn.Linear]) -> None:
    """Changes the class alone: parameters, names, hooks and whoever holds the layer stay."""
    layer.__class__ = kind

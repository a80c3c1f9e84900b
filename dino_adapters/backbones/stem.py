"""The layer of a network that reads the pixels."""

from __future__ import annotations

from torch import nn

from dino_adapters.backbones.convnext import ConvNeXt
from dino_adapters.backbones.foreign import TimmNetwork, first_convolution
from dino_adapters.contracts import RecipeError


def stem_of(network: nn.Module) -> nn.Module:
    """Patch embedding, or first convolution.

    Raises:
        WeightsError: a network of timm names no single convolution.
        RecipeError: there is none of a name that we know.
    """
    if isinstance(network, TimmNetwork):
        return first_convolution(network)
    if isinstance(network, ConvNeXt):
        return network.downsample_layers[0]
    stem = getattr(network, "patch_embed", None)
    if not isinstance(stem, nn.Module):
        raise RecipeError(
            f"{type(network).__name__} has no patch_embed, which is to be trained for new bands. "
            "Call the layer that reads the pixels so, or give the bands that its weights know."
        )
    return stem

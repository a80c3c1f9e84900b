"""A network that no longer learns, with what a user must know about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.backbones.patch import check_images
from dino_adapters.contracts import BackboneInfo, Features, ShapeError, UnitsError


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for a while; then each module has its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        # Not inference_mode: what a network caches in it could not be used in training.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class FrozenBackbone:
    """`contracts.Backbone`: eval mode, no gradients, images checked before they are seen.

    The network passed in is frozen in place: its parameters no longer ask for gradients.

    Attributes:
        network: The network itself.
    """

    def __init__(self, network: nn.Module, info: BackboneInfo) -> None:
        self.network = network.eval().requires_grad_(False)
        self._info = info

    @property
    def info(self) -> BackboneInfo:
        """What the network is and expects."""
        return self._info

    @property
    def device(self) -> torch.device:
        """Where the weights are; images are moved there."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> FrozenBackbone:
        """Moves the weights; returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, images: Tensor, *, layers: Sequence[int] = (), norm: bool = True
    ) -> Features:
        """Features of a batch, on the device of the weights; see `contracts.Backbone`.

        Raises:
            ShapeError: C, H or W do not fit; the message names the nearest size.
            UnitsError: the images are integers, so that nobody has normalised them.
        """
        return self.network(self._ready(images), layers=layers, norm=norm)

    @torch.no_grad()
    def cls_attention(self, images: Tensor) -> Tensor | None:
        """Attention `(B, heads, N)` of the last block's class token; None for networks without.

        Raises:
            ShapeError: C, H or W do not fit.
            UnitsError: the images are integers.
        """
        attention: Any = getattr(self.network, "cls_attention", None)
        return None if attention is None else attention(self._ready(images))

    def _ready(self, images: Tensor) -> Tensor:
        channels = len(self._info.bands)
        if images.ndim != 4 or images.shape[1] != channels:
            names = ", ".join(band.name for band in self._info.bands)
            raise ShapeError(
                f"'{self._info.name}' got a tensor {tuple(images.shape)}. It reads (B, {channels}, "
                f"H, W) with the bands {names}: use data.units.to_model to pick them."
            )
        if not images.is_floating_point():
            raise UnitsError(
                f"'{self._info.name}' got images of {images.dtype}. It reads normalised floats: "
                "use data.units.to_model on what was read from the file."
            )
        check_images(images, channels=channels, multiple=self._info.patch_size)
        weights = next(self.network.parameters())
        return images.to(device=weights.device, dtype=weights.dtype)

"""Any network of timm behind `contracts.Network`: tokens from its last map."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_adapters.backbones.blocks import pick_layers
from dino_adapters.backbones.patch import check_images
from dino_adapters.contracts import (
    Features,
    RecipeError,
    ShapeError,
    UnknownNameError,
    WeightsError,
)
from dino_adapters.runtime.chance import derive
from dino_adapters.runtime.lookup import nearest


class TimmNetwork(nn.Module):
    """A timm network that returns `Features`; it can be frozen, or trained without masks.

    Convolutional networks and others without class token: `patches` are the pixels of the last
    feature map, `cls` is the pooled vector before the classifier (where a network widens that
    vector, `cls` is the plain mean of the map, so that all tokens have one width). Vision
    transformers: `cls` is the class token, or the network's own pooling where there is none;
    further prefix tokens are the registers.

    BatchNorm layers stay in eval mode under `.train()` too: the statistics of a small batch of
    crops would replace those of the data that the network was trained on. Their weights do learn.

    Attributes:
        model: The timm module, without classifier.
        name: timm's name of it.
        arguments: Keyword arguments of `timm.create_model` that rebuild it, JSON-safe.
    """

    supports_masks = False

    def __init__(
        self, model: nn.Module, *, name: str, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """Wraps a module as it is.

        Raises:
            WeightsError: the module offers no `forward_intermediates`.
        """
        super().__init__()
        if not all(hasattr(model, part) for part in ("forward_intermediates", "feature_info")):
            raise WeightsError(
                f"{type(model).__name__} has no forward_intermediates, so its feature maps cannot "
                "be read. Give a network of timm that has one (most do)."
            )
        self.model: Any = model
        self.name = name
        self.arguments: dict[str, Any] = dict(arguments or {})
        stages: list[dict[str, Any]] = list(model.feature_info)  # pyright: ignore[reportArgumentType]
        parameters = inspect.signature(self.model.forward_intermediates).parameters
        self.is_transformer = "return_prefix_tokens" in parameters
        self.depth = len(stages)
        self.patch_size = int(stages[-1]["reduction"])
        self.embed_dim = int(self.model.num_features)
        prefix = int(getattr(model, "num_prefix_tokens", 0)) if self.is_transformer else 0
        self._prefix = prefix
        self._has_class_token = prefix > 0 and getattr(model, "cls_token", None) is not None
        self.num_registers = prefix - int(self._has_class_token)
        self._pools_itself = int(getattr(model, "head_hidden_size", 0) or 0) == self.embed_dim

    @property
    def input_channels(self) -> int:
        """Channels that the first convolution reads."""
        return int(first_convolution(self).in_channels)

    def train(self, mode: bool = True) -> TimmNetwork:
        """Training mode for everything but BatchNorm."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor, *, layers: Sequence[int] = (), norm: bool = True) -> Features:
        """Features of normalised images.

        Args:
            images: `(B, C, H, W)` float; H and W are multiples of `patch_size`.
            layers: Blocks (transformers) or stages wanted too; negative ones count from the end.
                Maps of stages keep their own size and width.
            norm: Apply the final norm; convolutional networks have none to apply.

        Returns:
            `cls (B, D)`, `registers (B, R, D)`, `patches (B, N, D)`.

        Raises:
            ShapeError: the images do not fit; the message names the nearest size.
            UnknownNameError: there is no such layer.
        """
        check_images(images, channels=self.input_channels, multiple=self.patch_size)
        wanted = pick_layers(layers, self.depth)
        try:
            if self.is_transformer:
                return self._tokens(images, wanted, norm)
            return self._map(images, wanted)
        except AssertionError as error:  # how timm refuses sizes of networks with one fixed size
            size = self.model.default_cfg.get("input_size")
            raise ShapeError(
                f"{self.name} refuses images of {tuple(images.shape[-2:])} pixels ({error}). "
                f"It was made for {tuple(size[-2:]) if size else 'another size'}: resize to that."
            ) from error

    def forward_crops(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> list[Features]:
        """Features of each group of crops, one group after the other.

        Raises:
            RecipeError: a mask is given; this network cannot hide patches.
        """
        if any(mask is not None for mask in masks):
            raise RecipeError(
                f"{self.name} cannot hide patches, and masks were given. Set masks to None "
                "(supports_masks says so), or train one of our vision transformers."
            )
        return [self(group) for group in crops]

    def _tokens(self, images: Tensor, wanted: tuple[int, ...], norm: bool) -> Features:
        last = self.depth - 1
        indices = sorted({*wanted, last})
        # timm fails on return_prefix_tokens=True where there are no prefix tokens.
        options = {"return_prefix_tokens": True} if self._prefix else {}
        final, found = self.model.forward_intermediates(
            images, indices=indices, norm=norm, output_fmt="NCHW", **options
        )
        grid = (0, 0)
        pairs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for index, item in zip(indices, found, strict=True):
            spatial, prefix = item if self._prefix else (item, None)
            grid = (spatial.shape[-2], spatial.shape[-1])
            patches = spatial.flatten(2).transpose(1, 2)
            registers = patches[:, :0] if prefix is None else prefix
            if self._has_class_token:
                cls, registers = registers[:, 0], registers[:, 1:]
            else:
                cls = patches.mean(1)
            pairs[index] = (cls, registers, patches)
        cls, registers, patches = pairs[last]
        if not self._has_class_token and self._pools_itself and norm:
            cls = self.model.forward_head(final, pre_logits=True)
        earlier = tuple((pairs[index][0], pairs[index][2]) for index in wanted)
        return Features(cls, registers, patches, grid, layers=earlier)

    def _map(self, images: Tensor, wanted: tuple[int, ...]) -> Features:
        earlier: list[tuple[Tensor, Tensor]] = []
        if wanted:
            final, maps = self.model.forward_intermediates(images, indices=list(wanted))
            for found in maps:
                patches = found.flatten(2).transpose(1, 2)
                earlier.append((patches.mean(1), patches))
        # forward_intermediates may end before the last convolution (EfficientNet), so that the
        # final map always comes from the network's own forward.
        final = self.model.forward_features(images)
        if final.ndim != 4:
            raise ShapeError(
                f"{self.name} returns {final.ndim}-dimensional features and no map. Use another "
                "network: convolutional ones and vision transformers both work."
            )
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        pixels = final if channels_last else final.permute(0, 2, 3, 1)
        grid = (pixels.shape[1], pixels.shape[2])
        patches = pixels.flatten(1, 2)
        if self._pools_itself:
            cls = self.model.forward_head(final, pre_logits=True).flatten(1)
        else:
            cls = patches.mean(1)
        return Features(cls, patches[:, :0], patches, grid, layers=tuple(earlier))


def create_timm(
    name: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    seed: int = 0,
) -> TimmNetwork:
    """A timm network without classifier, by its name there (a `timm/` before it is dropped).

    Args:
        name: timm's name, with or without a tag of weights (`resnet18.a1_in1k`).
        arguments: Further keywords of `timm.create_model`, e.g. `in_chans`.
        pretrained: Fetch the weights over the network, which is never done unasked.
        seed: Random weights follow from it alone.

    Raises:
        UnknownNameError: timm has no such network.
        WeightsError: the weights cannot be fetched.
    """
    import timm

    name = name.removeprefix("timm/")
    check_timm_name(name)
    given: dict[str, Any] = {"num_classes": 0, **(arguments or {})}
    # timm draws from the global generator: it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        try:
            try:
                dynamic = {"dynamic_img_size": True, **given}
                model = timm.create_model(name, pretrained=pretrained, **dynamic)
                given = dynamic
            except TypeError as error:
                if "dynamic_img_size" not in str(error):
                    raise
                model = timm.create_model(name, pretrained=pretrained, **given)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise WeightsError(
                f"The weights of '{name}' could not be fetched ({type(error).__name__}). Check the "
                "connection, or download the file and name it with checkpoint=."
            ) from error
    return TimmNetwork(model, name=name, arguments=given)


def check_timm_name(name: str, others: Iterable[str] = ()) -> None:
    """Refuses names that timm does not know.

    Args:
        name: With or without a tag.
        others: Further names that may have been meant.

    Raises:
        UnknownNameError: the message holds the nearest name.
    """
    import timm

    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        hint = nearest(bare, [*timm.list_models(), *others])
        hint = hint if hint.startswith("Did") else f"Ours are {', '.join(others)}."
        raise UnknownNameError(f"There is no network called '{name}', with us or in timm. {hint}")
    known = {full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")} if tag else set()
    if tag and tag not in known:
        hint = nearest(tag, known) if known else "timm has no weights of it at all."
        raise UnknownNameError(f"timm's {bare} has no weights called '{tag}'. {hint}")


def first_convolution(network: TimmNetwork) -> nn.Conv2d:
    """The convolution that reads the image, as timm's own configuration names it.

    Raises:
        WeightsError: there is none, or there are several.
    """
    named = network.model.default_cfg.get("first_conv")
    if not isinstance(named, str):
        raise WeightsError(
            f"{network.name} names {named!r} as its first convolution. Its bands cannot be "
            "changed; give it RGB images or use another network."
        )
    module = network.model.get_submodule(named)
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        raise WeightsError(
            f"The first layer of {network.name} is {type(module).__name__}, and an ungrouped "
            "Conv2d was expected. Its bands cannot be changed; use another network."
        )
    return module

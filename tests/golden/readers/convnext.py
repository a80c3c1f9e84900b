"""Kind `convnext`: features, stage maps with and without resizing, gradients."""

import torch
from torch import Tensor

from dino_adapters.backbones.config import ConvNeXtConfig

from ..case import Case
from ..networks import check_gradients, official_backbone, official_network

CALLS = {"a": ((-2, -1), True), "b": ((0, 1, 3), True), "d": ((0, 1, 2, 3), False)}
"""Stages and `norm` of each call; they stand in the text of `calls`."""


def read(case: Case) -> None:
    official = case.settings["config"]
    config = ConvNeXtConfig(
        depths=tuple(official["depths"]),
        dims=tuple(official["dims"]),
        in_channels=official["in_chans"],
        layerscale=official["layer_scale_init_value"],
        patch_size=official["patch_size"],
    )
    assert official["drop_path_rate"] == 0.0
    weights = case.tensors("w/")
    for name in ("weight", "bias"):
        assert torch.equal(weights[f"norm.{name}"], weights[f"norms.3.{name}"])
    network = official_network(weights, config, case.dtype)
    images = [case.tensor(f"in/x{number}") for number in range(len(case.keys("in/x")))]
    assert [list(batch.shape[-2:]) for batch in images] == case.settings["sizes"]
    frozen = official_backbone(weights, config)
    with torch.no_grad():
        for number, batch in enumerate(images):
            features = network(batch)
            case.check(f"out/ff_{number}/x_norm_clstoken", features.cls)
            case.check(f"out/ff_{number}/x_norm_clstoken", frozen(batch).cls)
            case.check(f"out/ff_{number}/x_norm_patchtokens", features.patches)
            # Theirs holds the patches alone; ours has the pooled token in front.
            (tokens,) = network.encode([batch], [None])
            case.check(f"out/ff_{number}/x_prenorm", tokens[:, 1:])
            raw = network(batch, norm=False)
            torch.testing.assert_close(raw.cls, tokens[:, 0])
            for call, (stages, norm) in CALLS.items():
                layers = network(batch, layers=stages, norm=norm).layers
                for index, (cls, patches) in enumerate(layers):
                    _check_stage(case, f"out/gil_{call}_{number}/{index}", cls, patches)
    first, second = network.forward_crops(images, [None] * len(images))
    loss = (first.cls * case.tensor("in/probe0")).sum()
    loss = loss + (second.patches * case.tensor("in/probe1")).sum()
    case.check("out/probe_loss", loss)
    check_gradients(case, network, loss)


def _check_stage(case: Case, place: str, cls: Tensor, patches: Tensor) -> None:
    if f"{place}/cls" in case:
        case.check(f"{place}/cls", cls)
    expected = case.tensor(f"{place}/patch")
    if expected.ndim == 4:
        patches = patches.mT.unflatten(-1, expected.shape[-2:])
    case.check(f"{place}/patch", patches)

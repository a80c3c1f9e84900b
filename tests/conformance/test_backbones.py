"""What every backbone promises, whoever made the network."""

from __future__ import annotations

import pytest
import torch

from dino_adapters.backbones import build_network, export_backbone, load_backbone
from dino_adapters.contracts import (
    RGB,
    Backbone,
    Band,
    Features,
    Network,
    RecipeError,
    ShapeError,
    UnknownNameError,
)

SOURCES = {
    "vit": ("vitmicro8", {"depth": 2}),
    "learned": ("vits16_dino", {"depth": 2, "position_grid": 4}),
    "convnext": ("cnx_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "timm_cnn": ("resnet10t", None),
    "timm_mobile": ("tf_efficientnet_lite0", None),
    "timm_vit": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "img_size": 64}),
    "timm_dinov3": (
        "vit_small_patch16_dinov3_qkvb",
        {"depth": 2, "embed_dim": 64, "num_heads": 1},
    ),
}


@pytest.fixture(scope="module", params=list(SOURCES))
def source(request):
    name, architecture = SOURCES[request.param]
    return {"source": name, "architecture": architecture}


@pytest.fixture(scope="module")
def backbone(source):
    return load_backbone(**source)


def images(backbone, height=2, width=3, batch=2, seed=0):
    side = max(backbone.info.patch_size, 16)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(backbone.info.bands), height * side, width * side)
    return torch.randn(shape, generator=generator)


def same(a: Features, b: Features) -> bool:
    return all(
        torch.equal(getattr(a, part), getattr(b, part)) for part in ("cls", "registers", "patches")
    )


def test_it_is_a_backbone_and_a_network(backbone):
    info, network = backbone.info, backbone.network
    promises: tuple[object, object] = (backbone, network)
    assert isinstance(promises[0], Backbone)
    assert isinstance(promises[1], Network)
    assert (info.embed_dim, info.patch_size) == (network.embed_dim, network.patch_size)
    assert (info.registers, info.depth) == (network.num_registers, network.depth)
    assert len(info.digest) == 32
    assert len(info.mean) == len(info.std) == len(info.bands) == 3
    assert info.family in {"vit", "convnext", "timm"}


def test_shapes_on_an_oblong_image(backbone):
    info = backbone.info
    batch = images(backbone)
    features = backbone(batch)
    height, width = (side // info.patch_size for side in batch.shape[-2:])
    assert features.grid == (height, width)
    assert features.cls.shape == (2, info.embed_dim)
    assert features.registers.shape == (2, info.registers, info.embed_dim)
    assert features.patches.shape == (2, height * width, info.embed_dim)
    assert features.layers == ()
    assert torch.isfinite(features.patches).all()
    assert features.cls.dtype == torch.float32


def test_patches_are_row_major(backbone):
    """A change in the top right corner moves the top right quarter of the patches most."""
    batch = images(backbone, 4, 8, batch=1)
    side = max(backbone.info.patch_size, 16)
    changed = batch.clone()
    changed[..., :side, -side:] += 3
    before, after = backbone(batch), backbone(changed)
    height, width = before.grid
    moved = (after.patches - before.patches).norm(dim=-1).reshape(2, height // 2, 2, width // 2)
    assert moved.sum((1, 3)).flatten().argmax() == 1


def test_layers_come_in_order_and_end_in_the_last(backbone):
    batch = images(backbone)
    features = backbone(batch, layers=(-1, 0))
    assert len(features.layers) == 2
    swapped = backbone(batch, layers=(0, backbone.info.depth - 1))
    for (cls, patches), (other_cls, other_patches) in zip(
        features.layers, swapped.layers, strict=True
    ):
        assert torch.equal(cls, other_cls)
        assert torch.equal(patches, other_patches)
        assert cls.shape[-1] == patches.shape[-1]
    if backbone.info.family == "vit":
        assert torch.equal(features.layers[1][0], features.cls)
        assert torch.equal(features.layers[1][1], features.patches)
    assert same(features, backbone(batch))
    with pytest.raises(UnknownNameError):
        backbone(batch, layers=(backbone.info.depth,))


def test_one_image_or_many_are_alike(backbone):
    batch = images(backbone, batch=3)
    together = backbone(batch)
    for row in range(3):
        alone = backbone(batch[row : row + 1])
        assert torch.allclose(alone.cls[0], together.cls[row], atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_are_refused(backbone, channels):
    batch = images(backbone)[:, :1].repeat(1, channels, 1, 1)
    with pytest.raises(ShapeError, match="red, green, blue"):
        backbone(batch)


def test_other_sizes_are_refused_with_the_nearest(backbone):
    side = backbone.info.patch_size
    batch = torch.zeros(1, 3, 2 * side + 1, 3 * side)
    with pytest.raises(ShapeError, match=f"{2 * side} x {3 * side}"):
        backbone(batch)


def test_training_reaches_every_weight_that_acts(source):
    network, _ = build_network(**source)
    network.train()
    side = max(network.patch_size, 16)
    crops = [torch.randn(4, 3, 2 * side, 2 * side), torch.randn(4, 3, side, 2 * side)]
    mask = torch.zeros(4, (2 * side // network.patch_size) ** 2, dtype=torch.bool)
    mask[:, 0] = True
    found = network.forward_crops(crops, [mask if network.supports_masks else None, None])
    assert [len(features.cls) for features in found] == [4, 4]
    loss = torch.stack([f.cls.square().mean() + f.patches.pow(3).mean() for f in found]).sum()
    if network.num_registers:
        loss = loss + found[0].registers.square().mean()
    loss.backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None]
    assert silent == []


def test_masks_act_or_are_refused(source):
    network, _ = build_network(**source)
    side = max(network.patch_size, 16)
    crop = torch.randn(2, 3, 2 * side, 2 * side)
    mask = torch.ones(2, (2 * side // network.patch_size) ** 2, dtype=torch.bool)
    if network.supports_masks:
        hidden, seen = (network.forward_crops([crop], [m])[0].cls for m in (mask, None))
        assert not torch.allclose(hidden, seen)
    else:
        with pytest.raises((RecipeError, ShapeError), match="cannot hide patches"):
            network.forward_crops([crop], [mask])


def test_export_and_back_to_the_bit(source, tmp_path):
    network, info = build_network(**source, seed=5)
    again = load_backbone(export_backbone(network, info, tmp_path / "out"))
    assert again.info == info
    batch = images(again)
    with torch.no_grad():
        assert same(again(batch), network(batch))


def test_bands_of_any_number(source):
    bands = (*RGB, Band("nir", "reflectance", 842.0, 0.0, 1.0))
    backbone = load_backbone(**source, bands=bands, mean=(0.5,) * 4, std=(0.2,) * 4)
    assert backbone(images(backbone)).cls.shape == (2, backbone.info.embed_dim)
    assert backbone.info.digest != load_backbone(**source).info.digest


def test_same_seed_same_digest(source, backbone):
    assert load_backbone(**source).info == backbone.info
    assert load_backbone(**source, seed=1).info.digest != backbone.info.digest

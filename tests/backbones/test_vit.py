import copy
from typing import Any

import pytest
import torch

from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.vit import VisionTransformer
from dino_adapters.contracts import Features, Network, ShapeError, UnknownNameError
from dino_adapters.runtime import chance

UNTIED: list[dict[str, Any]] = [
    {},
    {"untie_cls_norm": True},
    {"untie_local_cls_norm": True},
    {"untie_cls_norm": True, "untie_local_cls_norm": True},
]


def config(**changes: Any) -> ViTConfig:
    start: dict[str, Any] = {
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 8,
        "registers": 2,
    }
    return ViTConfig(**{**start, "layerscale": 0.5, **changes})


def build(seed: int = 0, *, drop_path: float = 0.0, **changes: Any) -> Any:
    """A float64 network whose every parameter is random, so that no part is invisible."""
    network = VisionTransformer(config(**changes), drop_path=drop_path)
    generator = chance.generator(seed, "weights")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return network.double().eval()


def images(count: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = chance.generator(seed, "images")
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def masks(count: int, patches: int) -> torch.Tensor:
    return torch.rand(count, patches, generator=chance.generator(0, "masks")) < 0.4


def assert_same(one: Features, two: Features) -> None:
    for name in ("cls", "registers", "patches"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))


# Shapes and refusals


def test_it_is_a_network_with_the_promised_shapes():
    network = build()
    assert isinstance(network, Network)
    features = network(images(2, 24, 40), layers=(0, -1))
    assert features.cls.shape == (2, 32)
    assert features.registers.shape == (2, 2, 32)
    assert features.patches.shape == (2, 15, 32)
    assert features.grid == (3, 5)
    assert [(cls.shape, patches.shape) for cls, patches in features.layers] == [
        ((2, 32), (2, 15, 32))
    ] * 2
    assert (network.embed_dim, network.patch_size, network.num_registers) == (32, 8, 2)
    assert (network.depth, network.supports_masks) == (3, True)


def test_no_registers():
    features = build(registers=0)(images(1, 8, 8))
    assert features.registers.shape == (1, 0, 32)
    assert features.patches.shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("height", "width", "near"), [(25, 40, "24 x 40"), (30, 12, "32 x 16"), (3, 8, "8 x 8")]
)
def test_a_size_that_would_be_cropped_is_refused(height, width, near):
    with pytest.raises(ShapeError, match=rf"{height} x {width} .*multiples of 8.* {near}"):
        build()(images(1, height, width))


def test_wrong_bands_and_dimensions_are_refused():
    with pytest.raises(ShapeError, match=r"4 channels, the network reads 3"):
        build()(torch.zeros(1, 4, 8, 8, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"\(3, 8, 8\)"):
        build()(torch.zeros(3, 8, 8, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"mask has shape \(2, 3\)"):
        build().forward_crops([images(2, 16, 16)], [masks(2, 3)])
    with pytest.raises(UnknownNameError, match="Layer 3"):
        build()(images(1, 8, 8), layers=(3,))


def test_any_number_of_bands():
    network = build(in_channels=13)
    assert network(torch.zeros(1, 13, 16, 16, dtype=torch.float64)).patches.shape == (1, 4, 32)


# What comes out


@pytest.mark.parametrize("untied", UNTIED)
def test_layers_are_the_tokens_of_a_shorter_network(untied):
    network, x = build(**untied), images(2, 16, 24)
    features = network(x, layers=(-1, 0, 1))
    assert len(features.layers) == 3
    for index, (cls, patches) in enumerate(features.layers):
        shorter = copy.deepcopy(network)
        shorter.blocks = shorter.blocks[: index + 1]
        expected = shorter(x)
        torch.testing.assert_close(cls, expected.cls)
        torch.testing.assert_close(patches, expected.patches)
    raw = network(x, layers=(2,), norm=False)
    (tokens,) = network.encode([x], [None])
    assert torch.equal(raw.cls, tokens[:, 0])
    assert torch.equal(raw.registers, tokens[:, 1:3])
    assert torch.equal(raw.patches, tokens[:, 3:])
    assert torch.equal(raw.layers[0][0], raw.cls)
    own = network.cls_norm if network.cls_norm is not None else network.norm
    torch.testing.assert_close(features.cls, own(raw.cls))
    torch.testing.assert_close(features.registers, own(raw.registers))
    torch.testing.assert_close(features.patches, network.norm(raw.patches))


def test_groups_in_step_are_groups_by_themselves():
    network = build()
    crops, hidden = [images(4, 32, 32), images(6, 16, 16, seed=1)], [masks(4, 16), None]
    together = network.forward_crops(crops, hidden)
    for crop, mask, features in zip(crops, hidden, together, strict=True):
        assert_same(features, network.forward_crops([crop], [mask])[0])
    assert_same(together[1], network(crops[1]))


def test_rows_do_not_see_each_other():
    network, x = build(), images(3, 16, 16)
    alone = [network(x[row : row + 1]).patches for row in range(3)]
    torch.testing.assert_close(network(x).patches, torch.cat(alone))


def test_hidden_patches_are_not_seen():
    network, x = build(), images(2, 32, 32)
    mask = masks(2, 16)
    changed = x.clone()
    for row, cell in mask.nonzero().tolist():
        top, left = 8 * (cell // 4), 8 * (cell % 4)
        changed[row, :, top : top + 8, left : left + 8] += 1.0
    assert not torch.equal(changed, x)
    before, after = (network.forward_crops([y], [mask])[0] for y in (x, changed))
    assert torch.equal(before.patches, after.patches)
    assert not torch.allclose(network(x).patches, network(changed).patches)
    # An empty mask hides nothing.
    nothing = torch.zeros_like(mask)
    assert_same(network.forward_crops([x], [nothing])[0], network(x))


def test_mask_token_always_has_a_gradient():
    network = build()
    network(images(1, 8, 8)).cls.sum().backward()
    assert torch.equal(network.mask_token.grad, torch.zeros(1, 32, dtype=torch.float64))
    network.zero_grad()
    network.forward_crops([images(2, 32, 32)], [masks(2, 16)])[0].cls.square().sum().backward()
    assert bool(network.mask_token.grad.any())


def test_class_attention_is_that_of_the_last_block():
    network, x = build(), images(2, 16, 24)
    inputs = {}
    network.blocks[-1].attn.qkv.register_forward_hook(
        lambda module, args, output: inputs.update(qkv=output)
    )
    found = network.cls_attention(x)
    assert found.shape == (2, 2, 6)
    q, k, _ = inputs["qkv"].reshape(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
    sin, cos = network.rope_embed((2, 3), network.draws)
    turned = torch.cat([-k[:, :, 3:, 8:], k[:, :, 3:, :8]], dim=-1)
    k = torch.cat([k[:, :, :3], k[:, :, 3:] * cos + turned * sin], dim=2)
    weights = torch.softmax((q[:, :, :1] @ k.mT)[:, :, 0] / 4.0, dim=-1)
    torch.testing.assert_close(found, weights[:, :, 3:])
    assert bool((found.sum(-1) < 1).all())


# Precision


def test_autocast_stays_close_to_fp32():
    network = build().float()
    x, mask = images(2, 32, 32).float(), masks(2, 16)
    expected = network.forward_crops([x], [mask])[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = network.forward_crops([x], [mask])[0]
        found.cls.float().sum().backward()
    for name in ("cls", "registers", "patches"):
        a, b = getattr(found, name).detach().float(), getattr(expected, name).detach()
        # bfloat16 keeps 8 bits: 0.4 % an operation, over three blocks.
        assert float((a - b).abs().max() / b.abs().max()) < 0.1
    assert bool(network.patch_embed.proj.weight.grad.isfinite().all())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_half_precision_weights_run(dtype):
    network = build(rope_dtype=dtype).bfloat16()
    features = network(images(1, 16, 16).bfloat16())
    assert features.patches.dtype == torch.bfloat16
    assert bool(features.patches.isfinite().all())


def test_fp32_is_close_to_float64():
    network, x = build(), images(2, 24, 32)
    expected = network(x).patches
    found = network.float()(x.float()).patches
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_is_the_same():
    network, x = build(), images(2, 16, 16)
    expected = network(x, layers=(0,))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found = compiled(x, layers=(0,))
    assert_same(found, expected)
    torch.testing.assert_close(found.layers[0][1], expected.layers[0][1])

import math
from typing import Any

import pytest
import torch

from dino_adapters.backbones.config import ConvNeXtConfig
from dino_adapters.backbones.convnext import ConvNeXt, ConvNeXtBlock
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.contracts import Network, ShapeError, UnknownNameError
from dino_adapters.runtime import chance


def build(*, drop_path: float = 0.0, **changes: Any) -> Any:
    """A small float64 network whose every parameter is random, so that no part is invisible."""
    start: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (6, 8, 10, 12)}
    network = ConvNeXt(ConvNeXtConfig(**(start | changes)), drop_path=drop_path)
    generator = chance.generator(0, "weights")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return network.double().eval()


def images(count: int, height: int, width: int) -> torch.Tensor:
    generator = chance.generator(0, "images")
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def test_it_is_a_network_with_the_promised_shapes():
    network = build()
    assert isinstance(network, Network)
    features = network(images(2, 64, 96), layers=(0, 1, -1))
    assert features.cls.shape == (2, 12)
    assert features.registers.shape == (2, 0, 12)
    assert features.patches.shape == (2, 6, 12)
    assert features.grid == (2, 3)
    assert [(tuple(c.shape), tuple(p.shape)) for c, p in features.layers] == [
        ((2, 6), (2, 16 * 24, 6)),
        ((2, 8), (2, 8 * 12, 8)),
        ((2, 12), (2, 2 * 3, 12)),
    ]
    assert (network.embed_dim, network.patch_size, network.depth) == (12, 32, 4)


def test_what_it_cannot_read_is_refused():
    with pytest.raises(ShapeError, match=r"64 x 80 .*multiples of 32.* 64 x 96"):
        build()(images(1, 64, 80))
    with pytest.raises(ShapeError, match="channels"):
        build(in_channels=4)(images(1, 32, 32))
    with pytest.raises(ShapeError, match="cannot hide patches"):
        build().forward_crops([images(1, 32, 32)], [torch.zeros(1, 1, dtype=torch.bool)])
    with pytest.raises(ShapeError, match="cannot hide patches"):
        build().encode([images(1, 32, 32)], [torch.zeros(1, 1, dtype=torch.bool)])
    with pytest.raises(UnknownNameError, match="Layer 4"):
        build()(images(1, 32, 32), layers=(4,))


def test_class_token_is_the_normed_mean_of_the_raw_map():
    network, x = build(), images(2, 64, 64)
    raw, normed = network(x, norm=False), network(x)
    torch.testing.assert_close(raw.cls, raw.patches.mean(1))
    torch.testing.assert_close(normed.cls, network.norm(raw.cls))
    torch.testing.assert_close(normed.patches, network.norm(raw.patches))
    (tokens,) = network.encode([x], [None])
    torch.testing.assert_close(tokens, torch.cat([raw.cls[:, None], raw.patches], dim=1))


def test_only_the_last_stage_is_normed():
    network, x = build(), images(1, 64, 64)
    normed = network(x, layers=range(4)).layers
    raw = network(x, layers=range(4), norm=False).layers
    for (cls, patches), (raw_cls, raw_patches) in zip(normed[:3], raw[:3], strict=True):
        assert torch.equal(cls, raw_cls)
        assert torch.equal(patches, raw_patches)
    torch.testing.assert_close(normed[3][0], network(x).cls)
    torch.testing.assert_close(normed[3][1], network(x).patches)


def test_maps_are_resized_after_pooling_and_before_the_norm():
    plain, resized, x = build(), build(patch_size=16), images(2, 64, 96)
    before = plain(x, layers=range(4), norm=False).layers
    after = resized(x, layers=range(4)).layers
    for stage, ((cls, patches), (new_cls, new_patches)) in enumerate(
        zip(before, after, strict=True)
    ):
        stride = 4 * 2**stage
        as_map = patches.mT.unflatten(-1, (64 // stride, 96 // stride))
        as_map = torch.nn.functional.interpolate(as_map, (4, 6), mode="bilinear", antialias=True)
        tokens = as_map.flatten(2).mT
        norm = resized.norm if stage == 3 else torch.nn.Identity()
        torch.testing.assert_close(new_patches, norm(tokens))
        torch.testing.assert_close(new_cls, norm(cls))
    assert torch.equal(resized(x).patches, plain(x).patches)


def test_groups_are_groups_by_themselves():
    network, crops = build(), [images(2, 64, 64), images(3, 32, 32)]
    for crop, features in zip(crops, network.forward_crops(crops, [None, None]), strict=True):
        assert torch.equal(features.patches, network(crop).patches)
        assert torch.equal(features.cls, network(crop).cls)


def test_block_by_a_loop_over_cells():
    block: Any = ConvNeXtBlock(4, layerscale=1.0)
    generator = chance.generator(0, "weights")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3, generator=generator)
    block = block.double().eval()
    x = images(1, 5, 6).repeat(1, 2, 1, 1)[:, :4]
    found = block(x, RandomDraws())
    padded = torch.nn.functional.pad(x[0], (3, 3, 3, 3))
    for row in range(5):
        for column in range(6):
            window = padded[:, row : row + 7, column : column + 7]
            v = (window * block.dwconv.weight[:, 0]).sum((1, 2)) + block.dwconv.bias
            v = (v - v.mean()) / (v.var(correction=0) + 1e-6).sqrt()
            v = v * block.norm.weight + block.norm.bias
            v = block.pwconv1.weight @ v + block.pwconv1.bias
            v = v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))
            v = (block.pwconv2.weight @ v + block.pwconv2.bias) * block.gamma
            torch.testing.assert_close(found[0, :, row, column], x[0, :, row, column] + v)


def test_rates_of_dropping_rise_from_zero():
    network = build(drop_path=0.4)
    rates = [block.drop_path for stage in network.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_dropped_rows_keep_their_input_and_the_mean_is_kept():
    block = ConvNeXtBlock(4, layerscale=1.0, drop_path=0.25).double()
    x = images(1, 4, 4).repeat(4000, 2, 1, 1)[:, :4]
    with torch.no_grad():
        full = block.eval()(x[:1], RandomDraws()) - x[:1]
        block.train()
        added = block(x, RandomDraws(chance.generator(0, "test"))) - x
    dropped = added.abs().amax((1, 2, 3)) < 1e-12
    torch.testing.assert_close(
        added[~dropped], (full / 0.75).expand(int((~dropped).sum()), 4, 4, 4)
    )
    # Standard error of a share of 4,000: 0.007.
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.03)


def test_eval_and_rate_zero_draw_nothing():
    class Nothing:
        def uniform(self, low, high, shape, *, like):
            raise AssertionError("drawn")

        def permutation(self, count, *, device):
            raise AssertionError("drawn")

    for network in (build(drop_path=0.4).eval(), build().train()):
        network.set_draws(Nothing())
        network(images(2, 32, 32))


def test_training_is_a_function_of_the_generator():
    network, x = build(drop_path=0.6).train(), images(8, 32, 32)
    found = []
    for step in (1, 2, 1):
        network.set_draws(RandomDraws(chance.generator(0, "network", step)))
        found.append(network(x).cls)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_start_is_a_function_of_the_generator_and_complete():
    with torch.device("meta"):
        network = ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(32, 48, 64, 80)))
    network.to_empty(device="cpu")
    found = []
    for seed in (1, 1, 2):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.fill_(float("nan"))
        network.reset_parameters(chance.generator(seed, "weights"))
        found.append({key: value.clone() for key, value in network.state_dict().items()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    name = "stages.0.0.pwconv1.weight"
    assert not torch.equal(found[0][name], found[2][name])
    for name, value in found[0].items():
        if value.ndim > 1:
            assert float(value.std()) == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("gamma"):
            assert bool((value == 1e-6).all())
        else:
            assert bool((value == float(name.endswith("weight"))).all()), name


def test_names_are_the_official_ones():
    names = set(build().state_dict())
    assert {
        "downsample_layers.0.0.weight",
        "downsample_layers.0.1.bias",
        "downsample_layers.3.1.weight",
        "stages.1.1.dwconv.weight",
        "stages.3.0.gamma",
        "norm.weight",
    } <= names
    assert not any(name.startswith("norms.") for name in names)


def test_no_gain_without_a_start_value():
    network = build(layerscale=None)
    assert not any("gamma" in name for name in network.state_dict())
    assert network(images(1, 32, 32)).cls.shape == (1, 12)


def test_autocast_stays_close_to_fp32():
    network, x = build().float(), images(2, 64, 64).float()
    expected = network(x).patches
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x).patches.float()
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.1

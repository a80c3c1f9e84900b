"""What a ViT does in training only: local norms, draws, starting weights."""

import copy
import itertools
from typing import Any

import pytest
import torch

from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.backbones.vit import VisionTransformer
from dino_adapters.runtime import chance

OFF: dict[str, Any] = {"rope_shift": None, "rope_jitter": None, "rope_rescale": None}
UNTIED: list[dict[str, Any]] = [
    {},
    {"untie_cls_norm": True},
    {"untie_local_cls_norm": True},
    {"untie_cls_norm": True, "untie_local_cls_norm": True},
]


class Recorder:
    """Real draws, with a list of what was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.inner = RandomDraws(chance.generator(seed, "test"))
        self.asked: list[str] = []
        self.values: list[torch.Tensor] = []

    def uniform(self, low, high, shape, *, like):
        self.asked.append(f"uniform {shape[0]}")
        self.values.append(self.inner.uniform(low, high, shape, like=like))
        return self.values[-1]

    def permutation(self, count, *, device):
        self.asked.append(f"permutation {count}")
        return self.inner.permutation(count, device=device)


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


# The norm of local crops


@pytest.mark.parametrize("untied", UNTIED)
@pytest.mark.parametrize("training", [False, True])
def test_norms_of_groups(untied, training):
    network = build(**OFF, **untied).train(training)
    crops, hidden = [images(2, 16, 16), images(3, 8, 8), images(2, 8, 16)], [None] * 3
    tokens = network.encode(crops, hidden)
    found = network.forward_crops(crops, hidden)
    for index, (raw, features) in enumerate(zip(tokens, found, strict=True)):
        own = network.cls_norm or network.norm
        if index > 0 and training and network.local_cls_norm is not None:
            own = network.local_cls_norm
        torch.testing.assert_close(features.cls, own(raw[:, 0]))
        torch.testing.assert_close(features.registers, own(raw[:, 1:3]))
        torch.testing.assert_close(features.patches, network.norm(raw[:, 3:]))


def test_local_norm_learns_from_local_crops_alone():
    network = build(**OFF, untie_local_cls_norm=True).train()
    crops, hidden = [images(2, 16, 16), images(3, 8, 8)], [None] * 2
    wide, near = network.forward_crops(crops, hidden)
    (wide.cls.square().sum() + near.patches.square().sum()).backward()
    assert network.local_cls_norm.weight.grad is None
    wide, near = network.forward_crops(crops, hidden)
    near.cls.square().sum().backward()
    gradient = network.local_cls_norm.weight.grad
    assert gradient is not None
    assert bool(gradient.any())


# Random numbers


def test_order_of_draws():
    network = build(drop_path=0.5, rope_shift=0.2, rope_jitter=1.2).train()
    draws = Recorder()
    network.set_draws(draws)
    network.forward_crops([images(4, 16, 16), images(6, 8, 8)], [None, None])
    rope = ["uniform 2", "uniform 2", "uniform 1"]
    block = [*rope, *rope, "permutation 4", "permutation 6", "permutation 4", "permutation 6"]
    assert draws.asked == 3 * block
    # Every block has augmentation of its own.
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws.values[::3], 2))


def test_eval_draws_nothing():
    network = build(drop_path=0.5, rope_shift=0.2, rope_jitter=1.2)
    draws = Recorder()
    network.set_draws(draws)
    network.forward_crops([images(2, 16, 16), images(3, 8, 8)], [None, None])
    network(images(2, 16, 16), layers=(0,))
    network.cls_attention(images(2, 16, 16))
    assert draws.asked == []


def test_training_is_a_function_of_the_generator():
    network, x = build(drop_path=0.5).train(), images(4, 16, 16)
    found = []
    for step in (1, 2, 1):
        network.set_draws(RandomDraws(chance.generator(0, "network", step)))
        found.append(network(x).cls)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_unset_draws_follow_the_global_generator():
    network, x = build(drop_path=0.5).train(), images(4, 16, 16)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = network(x).cls
        second = network(x).cls
        torch.manual_seed(1)
        assert torch.equal(network(x).cls, first)
    assert not torch.equal(first, second)


def test_a_copy_draws_by_itself():
    network, x = build(drop_path=0.5).train(), images(4, 16, 16)
    network.set_draws(RandomDraws(chance.generator(0, "test")))
    twin = copy.deepcopy(network)
    first = network(x).cls
    assert torch.equal(twin(x).cls, first)
    assert not torch.equal(network(x).cls, first)


# Starting weights


def test_start_is_a_function_of_the_generator_and_complete():
    with torch.device("meta"):
        network = VisionTransformer(config(untie_cls_norm=True, untie_local_cls_norm=True))
    network.to_empty(device="cpu")
    found = []
    for seed in (1, 1, 2):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.fill_(float("nan"))
        network.reset_parameters(chance.generator(seed, "weights"))
        found.append({key: value.clone() for key, value in network.state_dict().items()})
    assert all(bool(value.isfinite().all()) for value in found[0].values())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not torch.equal(found[0]["cls_token"], found[2]["cls_token"])
    made = VisionTransformer(config(untie_cls_norm=True, untie_local_cls_norm=True))
    assert list(made.state_dict()) == list(found[0])
    for key in ("rope_embed.periods", "blocks.0.attn.qkv.bias_mask"):
        assert torch.equal(made.state_dict()[key], found[0][key])


def test_starting_values_are_those_of_the_method():
    network = VisionTransformer(config(embed_dim=256, layerscale=1e-5, registers=16))
    network.reset_parameters(chance.generator(0, "weights"))
    for name, value in network.state_dict().items():
        if name.startswith("patch_embed"):
            bound = (1 / (3 * 8 * 8)) ** 0.5
            assert bound * 0.95 < float(value.abs().max()) <= bound, name
        elif name in ("cls_token", "register_tokens") or (value.ndim == 2 and "mask" not in name):
            # 256 values and more: the relative standard error of the spread is below 5 %.
            assert float(value.std()) == pytest.approx(0.02, rel=0.2), name
        elif "norm" in name:
            assert bool((value == float(name.endswith("weight"))).all()), name
        elif name.endswith("gamma"):
            assert bool((value == 1e-5).all()), name
        elif name == "mask_token" or name.endswith("bias"):
            assert not value.any(), name
        else:
            assert name.endswith(("bias_mask", "periods")), name


def test_gradients_reach_every_parameter():
    network = build(**OFF, untie_cls_norm=True, untie_local_cls_norm=True).train()
    wide, near = network.forward_crops([images(2, 16, 16), images(3, 8, 8)], [masks(2, 4), None])
    loss = sum(f.cls.square().sum() + f.registers.square().sum() for f in (wide, near))
    (loss + wide.patches.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())

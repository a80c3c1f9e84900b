import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dino_adapters.backbones import blocks, rope
from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.contracts import UnknownNameError
from dino_adapters.runtime import chance

CPU = torch.device("cpu")


class FixedPermutations:
    """Hands out permutations from a list, and writes down how long each had to be."""

    def __init__(self, *permutations: tuple[int, ...]) -> None:
        self.left = list(permutations)
        self.asked: list[int] = []

    def uniform(self, low, high, shape, *, like):
        raise AssertionError("a block draws no uniform numbers")

    def permutation(self, count, *, device):
        self.asked.append(count)
        return torch.tensor(self.left.pop(0), device=device)


def config(**changes: Any) -> ViTConfig:
    start: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2, "layerscale": 0.5}
    return ViTConfig(**(start | changes))


def random_weights(module: nn.Module, seed: int = 0) -> Any:
    generator = chance.generator(seed, "weights")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module.double()


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=chance.generator(seed, "tokens"), dtype=torch.float64)


def tables_for(grid, head_dim):
    coordinates = rope.make_coordinates(grid, dtype=torch.float64)
    return rope.make_tables(
        coordinates, rope.make_periods(head_dim, base=100.0, dtype=torch.float64)
    )


# Widths


@pytest.mark.parametrize(
    ("dim", "ratio", "align", "width"),
    [
        (384, 6, 8, 1536),
        (1280, 6, 8, 5120),
        (4096, 3, 64, 8192),
        (64, 3, 64, 128),
        (48, 3, 64, 128),
        (100, 2.5, 8, 168),
        (10, 1, 8, 8),
    ],
)
def test_swiglu_width(dim, ratio, align, width):
    assert blocks.swiglu_width(dim, ratio, align) == width


@given(st.integers(1, 5000), st.integers(1, 32), st.sampled_from([8, 32, 64, 128]))
@settings(deadline=None, derandomize=True)
def test_swiglu_width_is_the_next_multiple(dim, quarters, align):
    exact = math.floor(dim * quarters / 4) * 2
    width = blocks.swiglu_width(dim, quarters / 4, align)
    assert width % align == 0
    assert width >= exact // 3 > width - align


def test_mlp_width_is_rounded_down():
    assert blocks.MLP(config(ffn_ratio=2.7)).fc1.out_features == 43


# Layers


@given(st.integers(1, 40), st.data())
@settings(deadline=None, derandomize=True)
def test_layers_come_in_block_order_each_once(depth, data):
    asked = data.draw(st.lists(st.integers(-depth, depth - 1), max_size=10))
    names = list(range(depth))
    assert list(blocks.pick_layers(asked, depth)) == sorted({names[layer] for layer in asked})


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(UnknownNameError, match=rf"Layer {layer} .* 3\. .*0 to 2.*-3 to -1"):
        blocks.pick_layers([0, layer], 3)


# Dropped rows


@pytest.mark.parametrize(
    ("count", "rate", "kept"),
    [
        (1, 0.3, 1),
        (2, 0.3, 1),
        (6, 0.3, 4),
        (4, 0.3, 2),
        (9, 0.3, 6),
        (10, 0.0, 10),
        (8, 0.5, 4),
        (3, 0.99, 1),
    ],
)
def test_kept_rows_are_rounded_down_but_never_none(count, rate, kept):
    draws = RandomDraws(chance.generator(0, "test"))
    rows = blocks.keep_rows(count, rate, draws, CPU).tolist()
    assert len(rows) == len(set(rows)) == kept
    assert set(rows) <= set(range(count))


def test_kept_rows_are_the_first_of_the_permutation():
    draws = FixedPermutations((3, 0, 5, 1, 4, 2))
    assert blocks.keep_rows(6, 0.3, draws, CPU).tolist() == [3, 0, 5, 1]


@given(st.integers(1, 8), st.floats(0, 0.95), st.integers(0, 99))
@settings(deadline=None, derandomize=True)
def test_branch_on_some_rows_is_gather_and_scatter(count, rate, seed):
    x = random_tokens(count, 3, 4, seed=seed)
    draws = RandomDraws(chance.generator(seed, "test"))
    rows = blocks.keep_rows(count, rate, draws, CPU)

    def branch(y):
        return y.square() + y.flip(1)

    found = blocks.add_branch(x, branch, rows)
    expected = x.clone()
    for row in rows.tolist():
        expected[row] += count / len(rows) * branch(x[row : row + 1])[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("count", "rate"), [(3, 0.4), (4, 0.5), (4, 0.3)])
def test_mean_over_all_permutations_is_that_without_dropping(count, rate):
    x = random_tokens(count, 2)
    outputs = []
    for permutation in itertools.permutations(range(count)):
        rows = blocks.keep_rows(count, rate, FixedPermutations(permutation), CPU)
        outputs.append(blocks.add_branch(x, torch.sin, rows))
    torch.testing.assert_close(torch.stack(outputs).mean(0), x + x.sin())


def test_block_draws_for_attention_of_all_groups_then_for_feed_forward():
    block = random_weights(blocks.Block(config(), drop_path=0.5)).train()
    permutations = [(1, 0), (2, 0, 1), (0, 1), (1, 2, 0)]
    draws = FixedPermutations(*permutations)
    wide, near = random_tokens(2, 1 + 4, 16), random_tokens(3, 1 + 1, 16)
    tables = [tables_for((2, 2), 8), tables_for((1, 1), 8)]
    found = block([wide, near], tables, draws)
    assert draws.asked == [2, 3, 2, 3]
    for x, table, result, order in zip((wide, near), tables, found, (0, 1), strict=True):
        attended, fed = permutations[order][:1], permutations[order + 2][:1]
        expected = x.clone()
        for row in attended:
            y = block.norm1(x[row : row + 1])
            expected[row] += len(x) * block.ls1.gamma * block.attn(y, table)[0]
        before = expected.clone()
        for row in fed:
            y = block.norm2(before[row : row + 1])
            expected[row] += len(x) * block.ls2.gamma * block.mlp(y)[0]
        torch.testing.assert_close(result, expected)


def test_block_drops_nothing_in_eval_or_at_rate_zero():
    x, tables = random_tokens(4, 1 + 4, 16), tables_for((2, 2), 8)
    block = random_weights(blocks.Block(config(), drop_path=0.5))
    plain = random_weights(blocks.Block(config(), drop_path=0.0))
    (first,) = block.eval()([x], [tables], FixedPermutations())
    (second,) = plain.train()([x], [tables], FixedPermutations())
    assert torch.equal(first, second)


# Attention


def naive_attention(module: blocks.Attention, x, tables, prefix):
    """Token by token; returns the output and the weights `(B, heads, T, T)`."""
    batch, count, dim = x.shape
    d = dim // module.num_heads
    bias = module.qkv.bias.clone()
    bias[dim : 2 * dim] = 0
    projected = x @ module.qkv.weight.T + bias
    q, k, v = projected[..., :dim], projected[..., dim : 2 * dim], projected[..., 2 * dim :]
    weights = torch.zeros(batch, module.num_heads, count, count, dtype=x.dtype)
    mixed = torch.zeros_like(x)

    def turned(vector, token):
        if token < prefix:
            return vector
        sin, cos = (table[token - prefix] for table in tables)
        return vector * cos + torch.cat([-vector[d // 2 :], vector[: d // 2]]) * sin

    for b, h in itertools.product(range(batch), range(module.num_heads)):
        part = slice(h * d, (h + 1) * d)
        for i in range(count):
            scores = torch.stack(
                [turned(q[b, i, part], i) @ turned(k[b, j, part], j) for j in range(count)]
            )
            weights[b, h, i] = (scores / math.sqrt(d)).exp() / (scores / math.sqrt(d)).exp().sum()
            mixed[b, i, part] = weights[b, h, i] @ v[b, :, part]
    return mixed @ module.proj.weight.T + module.proj.bias, weights


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_attention_is_that_of_a_loop_over_tokens(grid):
    module = random_weights(blocks.Attention(config()))
    x = random_tokens(2, 3 + grid[0] * grid[1], 16)
    tables = tables_for(grid, 8)
    expected, weights = naive_attention(module, x, tables, prefix=3)
    torch.testing.assert_close(module(x, tables), expected)
    torch.testing.assert_close(module.cls_weights(x, tables), weights[:, :, 0])


# The mask on the bias of k


def test_bias_of_k_has_no_effect_and_no_gradient():
    module = random_weights(blocks.Attention(config()))
    x, tables = random_tokens(2, 5, 16), tables_for((2, 2), 8)
    before = module(x, tables)
    before.square().sum().backward()
    gradient = module.qkv.bias.grad
    assert torch.equal(gradient[16:32], torch.zeros(16, dtype=torch.float64))
    assert bool((gradient[:16] != 0).all())
    assert bool((gradient[32:] != 0).all())
    with torch.no_grad():
        module.qkv.bias[16:32] = 100.0
    assert torch.equal(module(x, tables), before)


def test_a_file_whose_mask_is_all_zero_switches_the_bias_off():
    masked = random_weights(blocks.Attention(config()))
    weights = masked.state_dict()
    masked.load_state_dict(weights | {"qkv.bias_mask": torch.zeros(48)})
    without = blocks.Attention(config(qkv_bias=False)).double()
    without.load_state_dict(
        {key: value for key, value in weights.items() if not key.startswith("qkv.bias")}
    )
    x, tables = random_tokens(2, 5, 16), tables_for((2, 2), 8)
    torch.testing.assert_close(masked(x, tables), without(x, tables))
    # Opened again for training, a bias that starts at zero is the same function.
    with torch.no_grad():
        masked.qkv.bias.zero_()
    masked.qkv.reset_mask()
    torch.testing.assert_close(masked(x, tables), without(x, tables))


def test_a_file_without_mask_leaves_that_of_the_constructor():
    module: Any = blocks.Attention(config())
    weights = module.state_dict()
    mask = weights.pop("qkv.bias_mask")
    assert mask.tolist() == [1.0] * 16 + [0.0] * 16 + [1.0] * 16
    found = module.load_state_dict(weights, strict=False)
    assert found.missing_keys == ["qkv.bias_mask"]
    assert torch.equal(module.qkv.bias_mask, mask)


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"mask_k_bias": False}])
def test_no_mask_where_none_is_asked_for(changes):
    assert "qkv.bias_mask" not in blocks.Attention(config(**changes)).state_dict()


# Parts


def test_mlp_uses_the_exact_gelu():
    module = random_weights(blocks.MLP(config()))
    x = random_tokens(3, 16)
    hidden = x @ module.fc1.weight.T + module.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = hidden @ module.fc2.weight.T + module.fc2.bias
    torch.testing.assert_close(module(x), expected)


def test_swiglu_gates_the_second_map_by_the_first():
    module = random_weights(blocks.SwiGLU(config(ffn="swiglu")))
    x = random_tokens(3, 16)
    gate = x @ module.w1.weight.T + module.w1.bias
    hidden = gate / (1 + (-gate).exp()) * (x @ module.w2.weight.T + module.w2.bias)
    expected = hidden @ module.w3.weight.T + module.w3.bias
    torch.testing.assert_close(module(x), expected)


def test_rmsnorm_by_its_formula():
    module = random_weights(blocks.RMSNorm(16, eps=1e-5))
    x = random_tokens(3, 16)
    mean_square = (x * x).sum(-1, keepdim=True) / 16
    torch.testing.assert_close(module(x), x / (mean_square + 1e-5).sqrt() * module.weight)


def test_rmsnorm_of_bfloat16_is_computed_in_fp32():
    x = (1000 * random_tokens(3, 16)).bfloat16()
    found = blocks.RMSNorm(16, eps=1e-5).bfloat16()(x)
    expected = torch.nn.functional.rms_norm(x.float(), (16,), eps=1e-5).bfloat16()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("start", [None, 0.0])
def test_no_layerscale_without_a_start_value(start):
    block = blocks.Block(config(layerscale=start))
    assert not any("gamma" in name for name in block.state_dict())


@pytest.mark.parametrize("off", ["proj_bias", "ffn_bias"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_biases_can_be_left_out(off, ffn):
    block = blocks.Block(config(ffn=ffn, **{off: False}))
    part = {"proj_bias": "attn.proj.", "ffn_bias": "mlp."}[off]
    names = [name for name in block.state_dict() if name.startswith(part)]
    assert names
    assert not any(name.endswith("bias") for name in names)

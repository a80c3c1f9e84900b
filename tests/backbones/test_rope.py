import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.backbones import rope
from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.draws import RandomDraws
from dino_adapters.runtime import chance

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))
MODES = st.sampled_from(["separate", "max", "min"])


class Recorder:
    """Real draws, with a list of what was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.inner = RandomDraws(chance.generator(seed, "test"))
        self.asked: list[tuple[float, float, tuple[int, ...]]] = []
        self.values: list[torch.Tensor] = []

    def uniform(self, low, high, shape, *, like):
        self.asked.append((low, high, tuple(shape)))
        self.values.append(self.inner.uniform(low, high, shape, like=like))
        return self.values[-1]

    def permutation(self, count, *, device):
        raise AssertionError("rotary positions draw no permutation")


def config(**changes: Any) -> ViTConfig:
    start: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    return ViTConfig(**(start | changes))


def naive_coordinates(grid, mode):
    height, width = grid
    rows = {"separate": height, "max": max(grid), "min": min(grid)}[mode]
    columns = {"separate": width, "max": max(grid), "min": min(grid)}[mode]
    return [
        (2 * (i + 0.5) / rows - 1, 2 * (j + 0.5) / columns - 1)
        for i in range(height)
        for j in range(width)
    ]


def naive_rotation(vector, place, base):
    """Rotates one head vector: y turns pairs (m, m + d/2), x pairs (m + d/4, m + 3d/4)."""
    d = len(vector)
    out = list(vector)
    for axis, m in itertools.product((0, 1), range(d // 4)):
        angle = 2 * math.pi * place[axis] / base ** (4 * m / d)
        low, high = m + axis * d // 4, m + axis * d // 4 + d // 2
        out[low] = vector[low] * math.cos(angle) - vector[high] * math.sin(angle)
        out[high] = vector[high] * math.cos(angle) + vector[low] * math.sin(angle)
    return out


@given(GRIDS, MODES, st.sampled_from([4, 8, 12]), st.integers(0, 3), st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_rotation_is_that_of_a_loop_over_tokens(grid, mode, d, prefix, seed):
    count = grid[0] * grid[1]
    generator = chance.generator(seed, "test")
    tokens = torch.randn(2, 2, prefix + count, d, generator=generator, dtype=torch.float64)
    coordinates = rope.make_coordinates(grid, relative_to=mode, dtype=torch.float64)
    periods = rope.make_periods(d, base=100.0, dtype=torch.float64)
    found = rope.rotate(tokens, rope.make_tables(coordinates, periods))
    expected = tokens.clone()
    for b, h, n in itertools.product(range(2), range(2), range(count)):
        turned = naive_rotation(
            tokens[b, h, prefix + n].tolist(), naive_coordinates(grid, mode)[n], 100.0
        )
        expected[b, h, prefix + n] = torch.tensor(turned, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, :, :prefix], tokens[:, :, :prefix])


@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_scores_depend_on_relative_positions_alone(dy, dx, seed):
    generator = chance.generator(seed, "test")
    q, k = torch.randn(2, 12, 16, generator=generator, dtype=torch.float64)
    periods = rope.make_periods(16, base=100.0, dtype=torch.float64)
    here = rope.make_coordinates((3, 4), dtype=torch.float64)
    scores = []
    for places in (here, here + torch.tensor([dy, dx], dtype=torch.float64)):
        tables = rope.make_tables(places, periods)
        scores.append(rope.rotate(q, tables) @ rope.rotate(k, tables).mT)
    torch.testing.assert_close(scores[0], scores[1])


def test_periods_are_those_of_the_paper():
    periods = rope.make_periods(64, base=100.0, dtype=torch.float64)
    assert periods[:3].tolist() == pytest.approx([1.0, 1.3335, 1.7783], abs=1e-4)
    assert float(periods[-1]) == pytest.approx(74.99, abs=1e-2)
    spread = rope.make_periods(16, min_period=0.3, max_period=20.0, dtype=torch.float64)
    assert spread.tolist() == pytest.approx([0.3 * (20 / 0.3) ** (m / 3) for m in range(4)])


@given(GRIDS, MODES)
@settings(deadline=None, derandomize=True)
def test_coordinates_are_centres_of_patches(grid, mode):
    found = rope.make_coordinates(grid, relative_to=mode, dtype=torch.float64)
    assert found.tolist() == [pytest.approx(place) for place in naive_coordinates(grid, mode)]


def test_augmentation_shifts_then_jitters_then_rescales():
    coordinates = rope.make_coordinates((2, 3), dtype=torch.float64)
    draws = Recorder()
    found = rope.move_coordinates(coordinates, draws, shift=0.3, jitter=1.5, rescale=2.0)
    shift, jitter, rescale = draws.values
    expected = (coordinates + shift) * jitter.exp() * rescale.exp()
    torch.testing.assert_close(found, expected)
    assert draws.asked == [
        (-0.3, 0.3, (2,)),
        (-math.log(1.5), math.log(1.5), (2,)),
        (-math.log(2.0), math.log(2.0), (1,)),
    ]
    wrong_order = (coordinates * jitter.exp() + shift) * rescale.exp()
    assert not torch.allclose(found, wrong_order)


@pytest.mark.parametrize("name", ["shift", "jitter", "rescale"])
def test_what_is_off_draws_nothing(name):
    draws = Recorder()
    rope.move_coordinates(rope.make_coordinates((2, 2)), draws, **{name: 1.5})
    assert len(draws.asked) == 1


def test_draws_fill_their_range_evenly():
    draws = RandomDraws(chance.generator(0, "test"))
    like = torch.empty(0, dtype=torch.float64)
    values = draws.uniform(-0.5, 1.5, (20_000,), like=like)
    assert values.dtype == torch.float64
    assert -0.5 <= float(values.min()) < -0.49
    assert 1.49 < float(values.max()) < 1.5
    # The standard error of the mean of 20,000 draws from a range of 2 is 0.004.
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(values.std()) == pytest.approx(2 / math.sqrt(12), abs=0.02)


def test_draws_follow_their_generator():
    one, two = (RandomDraws(chance.generator(3, "test")) for _ in range(2))
    like = torch.empty(0)
    assert torch.equal(one.uniform(0, 1, (5,), like=like), two.uniform(0, 1, (5,), like=like))
    cpu = torch.device("cpu")
    first, second = one.permutation(50, device=cpu), two.permutation(50, device=cpu)
    assert torch.equal(first, second)
    assert sorted(first.tolist()) == list(range(50))
    assert not torch.equal(one.permutation(50, device=cpu), first)


def test_bfloat16_draws_are_coarse():
    draws = RandomDraws(chance.generator(0, "test"))
    values = draws.uniform(-1, 1, (1000,), like=torch.empty(0, dtype=torch.bfloat16))
    assert values.dtype == torch.bfloat16


def test_training_draws_anew_at_each_call_and_eval_never():
    module = rope.RotaryEmbedding(config(rope_shift=0.2, rope_jitter=1.2))
    draws = Recorder()
    module.train()
    first, second = module((3, 4), draws), module((3, 4), draws)
    assert len(draws.asked) == 6
    assert not torch.equal(first[0], second[0])
    # No batch and no head dimension: all samples and heads share one draw.
    assert first[0].shape == (12, 16)
    module.eval()
    kept = module((3, 4), draws)
    assert len(draws.asked) == 6
    assert module((3, 4), draws)[0] is kept[0]


def test_training_without_augmentation_keeps_its_tables():
    module = rope.RotaryEmbedding(config(rope_rescale=None)).train()
    draws = Recorder()
    assert module((3, 4), draws)[0] is module((3, 4), draws)[0]
    assert draws.asked == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["separate", "max", "min"])
def test_kept_tables_are_fresh_ones(dtype, mode):
    module = rope.RotaryEmbedding(config(rope_dtype=dtype, rope_coordinates=mode)).eval()
    for grid in ((3, 4), (5, 2), (3, 4)):
        coordinates = rope.make_coordinates(grid, relative_to=mode, dtype=module.periods.dtype)
        for found, fresh in zip(
            module(grid, Recorder()), rope.make_tables(coordinates, module.periods), strict=True
        ):
            assert torch.equal(found, fresh)
            assert found.dtype == module.table_dtype


def test_new_periods_are_seen():
    module = rope.RotaryEmbedding(config()).eval()
    before = module((3, 4), Recorder())[0]
    assert list(module.state_dict()) == ["periods"]
    module.load_state_dict({"periods": 2 * module.periods})
    assert not torch.equal(module((3, 4), Recorder())[0], before)
    module.reset_parameters()
    assert torch.equal(module((3, 4), Recorder())[0], before)


def test_number_of_kept_tables_is_bounded():
    module = rope.RotaryEmbedding(config()).eval()
    for width in range(1, 2 * rope.CACHED_GRIDS):
        module((1, width), Recorder())
    assert len(module._kept) == rope.CACHED_GRIDS


def test_tables_kept_in_inference_mode_serve_training():
    module = rope.RotaryEmbedding(config()).eval()
    with torch.inference_mode():
        module((2, 2), Recorder())
    tokens = torch.randn(1, 4, 16, requires_grad=True)
    rope.rotate(tokens, module((2, 2), Recorder())).sum().backward()
    assert tokens.grad is not None


def test_dtype_of_tables_follows_the_network_upwards_only():
    plain = rope.RotaryEmbedding(config()).eval()
    exact = plain.periods.clone()
    assert plain.bfloat16()((2, 2), Recorder())[0].dtype == torch.float32
    assert torch.equal(plain.periods, exact)
    assert plain.double()((2, 2), Recorder())[0].dtype == torch.float64
    rounded = rope.RotaryEmbedding(config(rope_dtype="bf16")).eval()
    assert rounded.periods.dtype == torch.bfloat16
    assert rounded.double()((2, 2), Recorder())[0].dtype == torch.bfloat16


def test_bfloat16_rounds_prefix_tokens_too():
    tokens = torch.randn(2, 1 + 4, 16, generator=chance.generator(0, "test"))
    module = rope.RotaryEmbedding(config(rope_dtype="bf16")).eval()
    found = rope.rotate(tokens, module((2, 2), Recorder()))
    assert found.dtype == torch.float32
    assert torch.equal(found[:, 0], tokens[:, 0].bfloat16().float())
    assert not torch.equal(found[:, 0], tokens[:, 0])


def test_autocast_changes_no_table():
    settings_on = config(rope_dtype="bf16", rope_shift=0.2, rope_jitter=1.2)
    module = rope.RotaryEmbedding(settings_on).train()
    plain = module((3, 3), Recorder())
    with torch.autocast("cpu", torch.bfloat16):
        cast = module((3, 3), Recorder())
    assert torch.equal(plain[0], cast[0])
    assert cast[0].dtype == torch.bfloat16

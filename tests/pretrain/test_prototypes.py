"""Projection heads: names, halves, lengths, and the three kinds of prototypes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_adapters.contracts import RecipeError
from dino_adapters.pretrain.prototypes import GAIN, ProjectionHead

KINDS = ["none", "free", "fixed"]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def head(**options):
    made = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, **options)
    made.reset_parameters(draws())
    return made


def tokens(dtype=torch.float32):
    return torch.randn(3, 5, 6, generator=draws(1), dtype=dtype)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_names_are_those_of_the_reference(layers):
    linears = ["mlp"] if layers == 1 else [f"mlp.{2 * index}" for index in range(layers)]
    expected = [f"{name}.{part}" for name in linears for part in ("weight", "bias")]
    assert list(head(layers=layers).state_dict()) == [*expected, "last_layer.weight"]


def test_no_layers_are_refused():
    with pytest.raises(RecipeError, match="0 layers"):
        ProjectionHead(6, 10, layers=0)


@pytest.mark.parametrize("kind", KINDS)
def test_halves_make_the_whole(kind):
    made, x = head(weight_norm=kind), tokens()
    bottleneck = made.project(x)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close(bottleneck, F.normalize(made.trunk(x), dim=-1))
    torch.testing.assert_close(made.scores(bottleneck), made(x), rtol=0, atol=0)
    torch.testing.assert_close(made(x), bottleneck @ made.last_layer.weight.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_bottleneck_is_normalised_in_float32_or_better(kind, dtype, kept):
    made = head(weight_norm=kind).to(dtype)
    bottleneck = made.project(tokens(dtype))
    assert bottleneck.dtype == kept
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3, 5, dtype=kept))
    assert made(tokens(dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_scores_come_in_its_dtype(kind):
    made = head(weight_norm=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, bottleneck = made(tokens()), made.project(tokens())
    assert scores.dtype == torch.bfloat16
    assert bottleneck.dtype == torch.float32
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3, 5))


def test_a_dead_bottleneck_has_a_finite_gradient():
    made = head()
    x = tokens().requires_grad_()
    with torch.no_grad():
        for parameter in made.mlp.parameters():
            parameter.zero_()
    made(x).sum().backward()
    for value in [x, *made.parameters()]:
        assert value.grad is not None
        assert bool(value.grad.isfinite().all())


@pytest.mark.parametrize(("kind", "norm"), [("none", 0.7), ("free", 0.7), ("fixed", 0.7)])
def test_a_told_length_is_that_of_all_prototypes(kind, norm):
    made = head(weight_norm=kind)
    made.reset_parameters(draws(), prototype_norm=norm)
    torch.testing.assert_close(made.last_layer.weight.norm(dim=1), torch.full((10,), norm))


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_depends_on_nothing_but_its_generator(kind):
    made = head(weight_norm=kind)
    for parameter in made.parameters():
        parameter.data.fill_(3.0)
    made.reset_parameters(draws())
    expected = head(weight_norm=kind).state_dict()
    torch.testing.assert_close(made.state_dict(), expected, rtol=0, atol=0)


def test_weights_start_with_a_deviation_of_two_hundredths():
    made = ProjectionHead(200, 300, hidden_dim=200, bottleneck_dim=100)
    made.reset_parameters(draws())
    for name, value in made.state_dict().items():
        # 20,000 values: the deviation of their deviation is 0.02 / 200.
        wide = 0.0 if name.endswith("bias") else 0.02
        assert float(value.std()) == pytest.approx(wide, abs=6 * 0.02 / 200)


@pytest.mark.parametrize("kind", ["free", "fixed"])
def test_gains_start_at_one_and_only_free_ones_move(kind):
    made = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, weight_norm=kind)
    gain = made.last_layer.get_parameter(GAIN)
    for _ in range(2):
        torch.testing.assert_close(made.last_layer.weight.norm(dim=1), torch.ones(10))
        made.reset_parameters(draws())
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    F.cross_entropy(made(tokens()).flatten(0, 1) / 0.1, torch.arange(15) % 10).backward()
    before = made.last_layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(made.last_layer.weight, before)
    moved = not torch.equal(gain, torch.ones(10, 1))
    assert moved == (kind == "free")
    torch.testing.assert_close(made.last_layer.weight.norm(dim=1), gain.flatten().abs())


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_a_teacher(kind):
    """Copies share nothing, and a moving average over the parameters is all they need."""
    student = head(weight_norm=kind)
    teacher = copy.deepcopy(student).requires_grad_(False)
    x = tokens()
    torch.testing.assert_close(teacher(x), student(x), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws(2)))
    assert not torch.allclose(teacher(x), student(x))
    with torch.no_grad():
        get_ema_multi_avg_fn(0.0)(list(teacher.parameters()), list(student.parameters()), 0)
    torch.testing.assert_close(teacher(x), student(x))
    teacher = head(weight_norm=kind)
    teacher.load_state_dict(student.state_dict())
    torch.testing.assert_close(teacher(x), student(x), rtol=0, atol=0)

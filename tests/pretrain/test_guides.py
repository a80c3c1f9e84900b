"""Metadata guides against loops, over micro-batches and ranks, and what they do to an encoder."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dino_adapters.contracts import RecipeError, ShapeError, UnknownNameError
from dino_adapters.data.metadata import Classes, Metadata, Numbers
from dino_adapters.pretrain.guide_kinds import Prototypical, ramp, steer
from dino_adapters.pretrain.guides import Guides, columns_of, make_guides, targets_of
from dino_adapters.recipes.continuing import GuideRecipe

CROPS, IMAGES, DIM = 2, 8, 6
SIZES = {"species": 4, "scanner": 3}
RECIPES = (
    GuideRecipe(column="species", momentum=0.9),
    GuideRecipe(column="scanner", kind="classification", effect="repel", hidden_dim=5),
    GuideRecipe(column="year", kind="regression", effect="repel", weight=0.1, hidden_dim=7),
)
TARGETS = {
    "species": torch.tensor([0, 1, 1, -1, 2, 0, 3, -1]),
    "scanner": torch.tensor([2, -1, 0, 1, 1, 2, -1, 0]),
    "year": torch.tensor([0.0, 0.5, math.nan, 1.0, 0.25, math.nan, math.nan, 0.75]),
}
MISSING = {
    "species": torch.full((IMAGES,), -1),
    "scanner": torch.full((IMAGES,), -1),
    "year": torch.full((IMAGES,), math.nan),
}


def normal(*shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def guides(*recipes, double=True):
    made = Guides(recipes or RECIPES, SIZES, DIM)
    made.reset_parameters(seed=0)
    with torch.no_grad():  # larger weights, so that everything matters
        for parameter in made.parameters():
            parameter.mul_(20).add_(0.1)
    return made.double() if double else made


def taught(made, *, seed=1, targets=TARGETS):
    """The same guides after one step, so that centres and norms are there."""
    made.note_teacher(normal(CROPS, IMAGES, DIM, seed=seed), targets)
    made.agree()
    made.total(normal(CROPS, IMAGES, DIM, seed=seed + 1), targets, 0.2)
    made.after()
    return made


def species_of(made):
    guide = made.each["species"]
    assert isinstance(guide, Prototypical)
    return guide


def part_of(targets, first, end):
    return {name: values[first:end] for name, values in targets.items()}


def state(made):
    return {name: value.clone() for name, value in made.state_dict().items()}


def assert_same(ours, theirs, **tolerance):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name, **tolerance)


# --- The losses, in loops -------------------------------------------------------------------------


def slow_mlp(mlp, token):
    x = token.tolist()
    layers = [module for module in mlp if isinstance(module, torch.nn.Linear)]
    for place, layer in enumerate(layers):
        x = [
            sum(w * v for w, v in zip(row, x, strict=True)) + b
            for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        ]
        if place < len(layers) - 1:
            x = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    return x


def slow_softmax_error(logits, own):
    return math.log(sum(math.exp(z) for z in logits)) - own


def slow_losses(made, cls, targets):
    errors = {name: [] for name in targets}
    bank = species_of(made).bank
    seen = [m for m in range(len(bank)) if bank[m].abs().sum() > 0]
    for crop in cls:
        for image, token in enumerate(crop):
            species = int(targets["species"][image])
            if species in seen:
                cosines = {m: float(bank[m] @ token / token.norm()) / 0.023 for m in seen}
                error = slow_softmax_error(cosines.values(), cosines[species])
                errors["species"].append(error)
            scanner = int(targets["scanner"][image])
            if scanner >= 0:
                logits = slow_mlp(made.each["scanner"].mlp, token)
                errors["scanner"].append(slow_softmax_error(logits, logits[scanner]))
            year = float(targets["year"][image])
            if not math.isnan(year):
                (z,) = slow_mlp(made.each["year"].mlp, token)
                errors["year"].append((1 / (1 + math.exp(-z)) - year) ** 2)
    return {name: sum(found) / len(found) for name, found in errors.items()}


def test_losses_are_the_loops_with_missing_values_and_unseen_classes():
    made = guides()
    first = TARGETS | {"species": torch.tensor([0, 1, 1, -1, -1, 0, 3, -1])}
    taught(made, targets=first)  # class 2 has no centre: no logit, and its image does not count
    assert species_of(made).seen().tolist() == [True, True, False, True]
    cls = normal(CROPS, IMAGES, DIM, seed=5)
    found = made.losses(cls, TARGETS, 0.3)
    expected = slow_losses(made, cls, TARGETS)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_total_is_the_weighted_sum():
    made = taught(guides())
    cls = normal(CROPS, IMAGES, DIM, seed=5)
    total, terms = made.total(cls, TARGETS, 0.3)
    values, weights = slow_losses(made, cls, TARGETS), made.weights()
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {f"guide/{name}": value for name, value in values.items()}
    )
    assert total.item() == pytest.approx(sum(weights[n].item() * values[n] for n in values))


def test_without_values_all_is_exactly_zero():
    for made in (guides(), taught(guides())):
        cls = normal(CROPS, IMAGES, DIM).requires_grad_()
        total, terms = made.total(cls, MISSING, 1.0)
        total.backward()
        assert total.item() == 0.0
        assert all(value.item() == 0.0 for value in terms.values())
        assert cls.grad is not None
        assert not cls.grad.any()
        for parameter in made.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_the_first_step_has_no_centres_and_no_prototypical_loss():
    made = guides()
    assert made.losses(normal(CROPS, IMAGES, DIM), TARGETS, 1.0)["species"].item() == 0.0


# --- Ramp and reversal ----------------------------------------------------------------------------


def test_ramp():
    assert [ramp(share) for share in (-1.0, 0.0)] == [0.0, 0.0]
    for share, value in [(0.1, 0.46212), (0.5, 0.98661), (1.0, 0.99991)]:
        assert ramp(share) == pytest.approx(value, abs=1e-5)
        assert ramp(share) == pytest.approx(math.tanh(5 * share))


def test_steering_changes_nothing_but_the_gradient():
    x = normal(4).requires_grad_()
    steered = steer(x, -0.3)
    assert torch.equal(steered, x)
    (gradient,) = torch.autograd.grad((steered * torch.arange(4)).sum(), x)
    torch.testing.assert_close(gradient, -0.3 * torch.arange(4, dtype=torch.float64))


def numerical(function, x, step=1e-6):
    gradient = torch.zeros_like(x)
    for place in range(x.numel()):
        values = []
        for sign in (1, -1):
            x.data.view(-1)[place] += sign * step
            values.append(function().item())
            x.data.view(-1)[place] -= sign * step
        gradient.view(-1)[place] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("column", ["species", "scanner", "year"])
@pytest.mark.parametrize("effect", ["attract", "repel"])
def test_tokens_are_steered_and_heads_are_not(column, effect):
    (recipe,) = (told for told in RECIPES if told.column == column)
    made = guides(recipe.model_copy(update={"effect": effect, "temperature": 0.5}))
    made.note_teacher(normal(CROPS, IMAGES, DIM, seed=1), TARGETS)
    made.after()
    cls = normal(CROPS, IMAGES, DIM).requires_grad_()
    share = 0.15
    made.total(cls, TARGETS, share)[0].backward()
    sign = 1 if effect == "attract" else -1
    with torch.no_grad():
        true = numerical(lambda: made.total(cls, TARGETS, share)[0], cls)
    torch.testing.assert_close(cls.grad, sign * ramp(share) * true, rtol=1e-5, atol=1e-9)
    assert true.abs().max() > 1e-4
    for parameter in made.parameters():
        with torch.no_grad():
            true = numerical(lambda: made.total(cls, TARGETS, share)[0], parameter)
        torch.testing.assert_close(parameter.grad, true, rtol=1e-5, atol=1e-9)


def test_heads_learn_while_the_backbone_is_frozen():
    made = guides()
    cls = normal(CROPS, IMAGES, DIM)  # without gradient, as of a frozen backbone
    made.total(cls, TARGETS, 0.0)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
    made.after()
    assert made.each["year"].norm > 0
    wanting = cls.clone().requires_grad_()
    made.total(wanting, TARGETS, 0.0)[0].backward()
    assert wanting.grad is not None
    assert not wanting.grad.any()


# --- Centres --------------------------------------------------------------------------------------


def unit(x):
    return x / x.norm()


def test_centres_follow_the_teacher():
    made = guides(RECIPES[0])
    expected = {}
    steps = [
        torch.tensor([0, 1, 1, -1, -1, 0, 3, -1]),
        torch.tensor([0, 0, 0, -1, 2, -1, 3, 3]),
        torch.tensor([-1] * IMAGES),
        torch.tensor([1, 2, 2, 2, 2, 2, 2, 2]),
    ]
    for step, codes in enumerate(steps):
        cls = normal(CROPS, IMAGES, DIM, seed=step) * (1 + torch.arange(IMAGES))[:, None]
        made.note_teacher(cls, {"species": codes})
        made.after()
        for name in set(codes.tolist()) - {-1}:
            tokens = [unit(crop[i]) for crop in cls for i in range(IMAGES) if codes[i] == name]
            mean = sum(tokens) / len(tokens)
            before = expected.get(name)
            expected[name] = unit(mean if before is None else 0.9 * before + 0.1 * mean)
        for name, row in enumerate(species_of(made).bank):
            torch.testing.assert_close(row, expected.get(name, torch.zeros(DIM).double()))
    assert species_of(made).seen().all()


# --- Balance --------------------------------------------------------------------------------------


def gradient_norm(made, column, cls, targets):
    leaf = cls.clone().requires_grad_()
    value = made.losses(leaf, targets, 50.0)[column]  # the ramp is 1 there
    (gradient,) = torch.autograd.grad(value, leaf)
    return gradient.norm().item()


def slow_average(norms):
    """Weights fall by 0.99 a step into the past, and sum to one."""
    weights = [0.99**age for age in range(len(norms))][::-1]
    return sum(w * norm for w, norm in zip(weights, norms, strict=True)) / sum(weights)


def test_balance_is_that_of_moving_norms():
    made, norms = guides(), {name: [] for name in TARGETS}
    for step in range(4):
        targets = TARGETS if step != 2 else TARGETS | {"year": MISSING["year"]}
        cls = normal(CROPS, IMAGES, DIM, seed=step)
        made.note_teacher(cls, targets)
        made.agree()
        found = {name: gradient_norm(made, name, cls, targets) for name in targets}
        made.total(cls, targets, 0.1 * step)
        made.after()
        for name, norm in found.items():
            if norm:  # a step without values or centres says nothing of a guide
                norms[name].append(norm)
        average = {name: slow_average(each) for name, each in norms.items() if each}
        assert {n: g.norm.item() for n, g in made.each.items() if g.norm} == pytest.approx(average)
        mean = math.prod(average.values()) ** (1 / len(average))
        weights = {r.column: r.weight for r in RECIPES}
        expected = {n: w * mean / average[n] if n in average else w for n, w in weights.items()}
        assert {n: w.item() for n, w in made.weights().items()} == pytest.approx(expected)
    assert [len(each) for each in norms.values()] == [3, 4, 3]


def test_one_guide_and_guides_without_weight_are_not_balanced():
    alone = taught(guides(RECIPES[1]))
    assert alone.weights()["scanner"].item() == pytest.approx(0.03)
    silent = RECIPES[2].model_copy(update={"weight": 0.0})
    pair = taught(guides(RECIPES[1], silent))
    assert pair.each["year"].norm > 0
    assert pair.weights()["scanner"].item() == pytest.approx(0.03)
    assert pair.weights()["year"].item() == 0.0


# --- Micro-batches and ranks ----------------------------------------------------------------------


def whole_and_parts(cuts):
    """Loss, gradients and the state after a step, at once and in micro-batches."""
    teacher, student = normal(CROPS, IMAGES, DIM, seed=7), normal(CROPS, IMAGES, DIM, seed=8)
    results = []
    for spans in ([(0, IMAGES)], cuts):
        made = taught(guides())
        leaf, total = student.clone().requires_grad_(), 0.0
        for first, end in spans:
            made.note_teacher(teacher[:, first:end], part_of(TARGETS, first, end))
        made.agree()
        for first, end in spans:
            loss, _ = made.total(leaf[:, first:end], part_of(TARGETS, first, end), 0.3)
            (loss * (end - first) / IMAGES).backward()
            total += loss.item() * (end - first) / IMAGES
        made.after()
        gradients = {name: p.grad for name, p in made.named_parameters()}
        results.append((total, {"cls": leaf.grad} | gradients, state(made)))
    return results


@pytest.mark.parametrize("cuts", [[(0, 4), (4, 8)], [(0, 3), (3, 6), (6, 8)]], ids=str)
def test_micro_batches_are_the_large_batch(cuts):
    whole, parts = whole_and_parts(cuts)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert_same(parts[1], whole[1], rtol=1e-10, atol=1e-14)
    assert_same(parts[2], whole[2], rtol=1e-10, atol=1e-14)


class Threads:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, size, table, barrier):
        self.rank, self.size, self.table, self.barrier = rank, size, table, barrier

    def sum(self, x):
        self.table[self.rank] = x.detach()
        self.barrier.wait()
        total = torch.stack(list(self.table)).sum(0)
        self.barrier.wait()
        return total

    def largest(self, x):
        raise NotImplementedError  # guides only ask for sums

    rows = largest


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_one_process(size):
    teacher, student = normal(CROPS, IMAGES, DIM, seed=7), normal(CROPS, IMAGES, DIM, seed=8)
    barrier, table = threading.Barrier(size, timeout=20), [None] * size
    start, each = taught(guides()), IMAGES // size

    def work(rank):
        try:
            ranks = Threads(rank, size, table, barrier)
            made = copy.deepcopy(start)
            here = slice(rank * each, (rank + 1) * each)
            targets = part_of(TARGETS, here.start, here.stop)
            leaf = student[:, here].clone().requires_grad_()
            made.note_teacher(teacher[:, here], targets)
            made.agree(ranks)
            loss, _ = made.total(leaf, targets, 0.3)
            loss.backward()
            made.after(ranks)
            assert leaf.grad is not None
            return loss.item(), leaf.grad, state(made)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(work, range(size)))
    (total, gradients, expected), _ = whole_and_parts([(0, 8)])
    assert sum(loss for loss, _, _ in found) / size == pytest.approx(total)
    tokens = torch.cat([gradient for _, gradient, _ in found], dim=1) / size
    torch.testing.assert_close(tokens, gradients["cls"])
    for _, _, after in found:
        assert_same(after, expected)


# --- State ----------------------------------------------------------------------------------------


def test_a_refused_step_leaves_nothing_behind():
    made, other = taught(guides()), taught(guides())
    before = state(made)
    made.note_teacher(normal(CROPS, IMAGES, DIM, seed=9) * math.nan, TARGETS)
    made.agree()
    made.total(normal(CROPS, IMAGES, DIM, seed=9), MISSING, 0.5)
    made.forget()
    assert_same(state(made), before, rtol=0, atol=0)
    assert_same(state(taught(made, seed=20)), state(taught(other, seed=20)), rtol=0, atol=0)


def test_a_state_goes_on_where_it_was_kept():
    made = taught(guides())
    fresh = guides()
    fresh.load_state_dict(copy.deepcopy(made.state_dict()))
    assert_same(state(taught(fresh, seed=20)), state(taught(made, seed=20)), rtol=0, atol=0)


def test_a_copy_is_a_copy():
    made = taught(guides())
    before = state(made)
    taught(copy.deepcopy(made), seed=20)
    assert_same(state(made), before, rtol=0, atol=0)


def test_names_of_the_state():
    odd = GuideRecipe(column="a.b/c d", kind="regression", hidden_dim=2)
    own = GuideRecipe(column="type", kind="regression", hidden_dim=2)
    made = Guides([RECIPES[0], odd, own], SIZES, DIM)
    assert {name for name in made.state_dict() if "mlp" not in name} == {
        "column_species.norm",
        "column_species.measured",
        "column_species.bank",
        "column_a%2Eb%2Fc%20d.norm",
        "column_a%2Eb%2Fc%20d.measured",
        "column_type.norm",
        "column_type.measured",
    }
    assert {n for n, _ in made.get_submodule("column_type").named_parameters()} == {
        f"mlp.{place}.{kind}" for place in (0, 2, 4) for kind in ("weight", "bias")
    }


def test_the_start_is_seeded_by_column_and_narrow():
    made = Guides(RECIPES, SIZES, DIM)
    made.reset_parameters(seed=3)
    alone = Guides(RECIPES[1:2], SIZES, DIM)
    alone.reset_parameters(seed=3)
    assert_same(state(alone.each["scanner"]), state(made.each["scanner"]), rtol=0, atol=0)
    other = Guides(RECIPES, SIZES, DIM)
    other.reset_parameters(seed=4)
    wide = Guides([GuideRecipe(column="year", kind="regression")], {}, 400)
    wide.reset_parameters(seed=0)
    for mine, theirs in zip(made.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs) == (mine.ndim == 1)  # biases are 0
    weight = next(wide.parameters())
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean().item()) < 2e-4
    taught(made.double()).reset_parameters(seed=3)
    assert not any(buffer.any() for buffer in made.buffers())


def test_meta_device():
    with torch.device("meta"):
        made = Guides(RECIPES, SIZES, DIM)
    made.to_empty(device="cpu").reset_parameters(seed=3)
    expected = Guides(RECIPES, SIZES, DIM)
    expected.reset_parameters(seed=3)
    assert_same(state(made), state(expected), rtol=0, atol=0)


def test_computed_in_fp32_under_autocast():
    cls = normal(CROPS, IMAGES, DIM, seed=3).float()
    made, same = taught(guides(double=False)), taught(guides(double=False))
    expected = made.losses(cls, TARGETS, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = same.losses(cls, TARGETS, 0.3)
        low = same.losses(cls.bfloat16(), TARGETS, 0.3)
        same.note_teacher(cls, TARGETS)
    for name, value in expected.items():
        assert value.dtype == found[name].dtype == low[name].dtype == torch.float32
        assert torch.equal(value, found[name])
        torch.testing.assert_close(low[name], value, rtol=0.1, atol=0.02)
    made.note_teacher(cls, TARGETS)
    made.after()
    same.after()
    assert torch.equal(species_of(made).bank, species_of(same).bank)


# --- Refusals and the road from metadata ----------------------------------------------------------


def metadata():
    return Metadata(
        tuple("abcdefgh"),
        {
            "species": Classes(tuple("wxyz"), TARGETS["species"].numpy()),
            "scanner": Classes(tuple("pqr"), TARGETS["scanner"].numpy()),
            "year": Numbers(TARGETS["year"].numpy(), 1990, 2030),
        },
    )


def test_from_metadata():
    assert columns_of(RECIPES) == {"species": "classes", "scanner": "classes", "year": "numbers"}
    made = make_guides(RECIPES, metadata(), DIM, seed=3)
    expected = Guides(RECIPES, SIZES, DIM)
    expected.reset_parameters(seed=3)
    assert_same(state(made), state(expected), rtol=0, atol=0)
    found = targets_of(metadata(), [6, 0, 3, 3])
    assert {name: values.dtype for name, values in found.items()} == {
        "species": torch.int64,
        "scanner": torch.int64,
        "year": torch.float32,
    }
    for name, values in found.items():
        assert torch.equal(values.nan_to_num(9.0), TARGETS[name][[6, 0, 3, 3]].nan_to_num(9.0))


def test_refusals():
    with pytest.raises(RecipeError, match="Two guides name the column 'species'"):
        Guides([RECIPES[0], RECIPES[0]], SIZES, DIM)
    with pytest.raises(RecipeError, match="guide of 'scanner' is a classification one"):
        Guides(RECIPES, {"species": 4}, DIM)
    wrong = RECIPES[0].model_copy(update={"kind": "regression"})
    with pytest.raises(RecipeError, match="guide of 'species' needs numbers"):
        make_guides([wrong], metadata(), DIM, seed=0)
    with pytest.raises(UnknownNameError, match="no metadata column 'specie'"):
        make_guides([GuideRecipe(column="specie")], metadata(), DIM, seed=0)


def test_targets_must_fit():
    made, cls = guides(), normal(CROPS, IMAGES, DIM)
    with pytest.raises(ShapeError, match="'year' has the targets none for class tokens"):
        made.losses(cls, {name: TARGETS[name] for name in SIZES}, 0.1)
    with pytest.raises(ShapeError, match=r"'species' has the targets \(3,\)"):
        made.note_teacher(cls, part_of(TARGETS, 0, 3))


# --- What it is for -------------------------------------------------------------------------------


def shown(tokens, codes):
    """Share of the tokens' variance that lies between two classes."""
    means = [tokens[codes == code].mean(0) for code in (0, 1)]
    between = (means[0] - means[1]).square().sum() / 4
    return (between / tokens.var(0, unbiased=False).sum()).item()


def photographed(seed, count):
    """Images of two unrelated factors, each along an axis of its own, in noise."""
    draws = torch.Generator().manual_seed(seed)
    codes = {n: torch.randint(0, 2, (count,), generator=draws) for n in ("species", "scanner")}
    images = torch.randn(count, 8, generator=draws)
    for axis, values in enumerate(codes.values()):
        images[:, axis] += 1.5 * (2 * values - 1)
    return images, codes


ATTRACT = GuideRecipe(column="species", weight=1.0, temperature=1.0, momentum=0.9)
REPEL = GuideRecipe(
    column="scanner", kind="classification", effect="repel", weight=1.0, hidden_dim=16
)


@pytest.mark.parametrize(
    ("recipes", "species", "scanner"),
    [([REPEL], (0.18, 0.4), (0.0, 0.13)), ([ATTRACT, REPEL], (0.4, 1.0), (0.0, 0.06))],
    ids=["repel", "both"],
)
def test_an_encoder_shows_what_attracts_and_hides_what_repels(recipes, species, scanner):
    encoder = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.eye_(encoder.weight)
    made = Guides(recipes, {"species": 2, "scanner": 2}, 8)
    made.reset_parameters(seed=0)
    optimizer = torch.optim.Adam(
        [
            {"params": encoder.parameters(), "lr": 3e-3},
            {"params": made.parameters(), "lr": 1e-2},
        ]
    )
    images, codes = photographed(9999, 2000)
    for values in codes.values():
        assert shown(images, values) == pytest.approx(0.18, abs=0.005)
    steps = 200
    for step in range(steps):
        pixels, targets = photographed(step, 128)
        tokens = encoder(pixels)[None]
        made.note_teacher(tokens.detach(), targets)
        made.agree()
        optimizer.zero_grad()
        made.total(tokens, targets, step / steps)[0].backward()
        optimizer.step()
        made.after()
    with torch.no_grad():
        tokens = encoder(images)
    assert species[0] < shown(tokens, codes["species"]) < species[1]
    assert scanner[0] < shown(tokens, codes["scanner"]) < scanner[1]

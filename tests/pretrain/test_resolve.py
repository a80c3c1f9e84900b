"""Settings from the number of images: bounds, order, sentences, and what is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, RecipeError
from dino_adapters.pretrain.resolve import (
    FRACTIONS,
    batch_size_for,
    loss_floor,
    passes_for,
    prototypes_for,
    resolve,
    steps_for,
)
from dino_adapters.recipes.pretrain import PretrainRecipe

AUTO = {
    "data": {"source": "photographs"},
    "optim": {"batch_size": "auto"},
    "objective": {"prototypes": "auto"},
    "steps": "auto",
}
COUNTS = st.integers(8, 10_000_000)


def recipe(**changes):
    told = {**AUTO}
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(told.get(key), dict)
        told[key] = {**told[key], **value} if nested else value
    return PretrainRecipe.model_validate(told)


def numbers(resolved):
    return (resolved.optim.batch_size, resolved.objective.prototypes, resolved.steps)


def sentences(reasons, *, warning):
    return {r.key: r.why for r in reasons if r.warning == warning}


@given(COUNTS)
@settings(deadline=None)
def test_the_bounds_hold_for_any_number_of_images(images):
    resolved, reasons = resolve(recipe(), images)
    batch, prototypes, steps = numbers(resolved)
    assert batch in (8, 16, 32, 64, 128, 256, 512, 1024)
    assert prototypes == 2 ** round(math.log2(prototypes))
    assert batch == 8 or 4 * batch <= images
    assert batch <= (64 if images <= 10_000 else 256 if images <= 100_000 else 1024)
    assert prototypes == 64 or prototypes <= images
    assert prototypes == 64 or math.log(prototypes / (2 * batch)) <= (
        1.4 if images <= 10_000 else 3.0
    )
    assert 300 <= steps <= 100_000
    assert [r.key for r in reasons] == ["optim.batch_size", "objective.prototypes", "steps"]
    assert [r.value for r in reasons] == [batch, prototypes, steps]
    assert not any(r.warning for r in reasons)


@given(COUNTS, COUNTS)
def test_more_images_never_mean_less(one, other):
    few, many = sorted((one, other))
    assert batch_size_for(few) <= batch_size_for(many)
    ours, theirs = (prototypes_for(n, 2 * batch_size_for(n)) for n in (few, many))
    assert ours <= theirs
    assert passes_for(few) >= passes_for(many)
    # Steps follow the images seen: more of them, unless the batch grew.
    assert steps_for(few, 64) <= steps_for(many, 64)
    assert passes_for(few) * few <= passes_for(many) * many


@given(COUNTS)
def test_prototypes_are_the_largest_that_the_rules_allow(images):
    rows = 2 * batch_size_for(images)
    chosen = prototypes_for(images, rows)
    limit = 1.4 if images <= 10_000 else 3.0
    allowed = [
        k
        for k in (2**i for i in range(6, 20))
        if k == 64 or (k <= images and math.log(k / rows) <= limit)
    ]
    assert chosen == max(allowed)


@given(COUNTS)
@settings(deadline=None)
def test_resolving_twice_changes_nothing(images):
    once, _ = resolve(recipe(), images)
    again, reasons = resolve(once, images)
    assert again == once
    assert all(r.warning for r in reasons)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (8, (8, 64, 300)),
        (100, (16, 64, 380)),
        (900, (64, 512, 840)),
        (10_000, (64, 512, 6800)),
        (10_001, (256, 8192, 1700)),
        (50_000, (256, 8192, 6200)),
        (200_000, (1024, 32768, 4200)),
        (1_000_000, (1024, 32768, 9800)),
        (1_000_000_000, (1024, 32768, 100_000)),
    ],
)
def test_what_the_rules_give(images, expected):
    assert numbers(resolve(recipe(), images)[0]) == expected


def test_passes_fall_from_sixty_to_ten():
    assert [passes_for(n) for n in (8, 1_000, 1_000_000, 10_000_000)] == [60, 60, 10, 10]
    assert passes_for(31_623) == pytest.approx(35, abs=0.01)


def test_the_floor_is_the_entropy_of_even_targets():
    # Rows that share K prototypes evenly: each row is uniform over K / rows of them.
    rows, prototypes = 8, 64
    share = rows / prototypes
    entropy = -(prototypes // rows) * share * math.log(share)
    assert loss_floor(prototypes, rows) == pytest.approx(entropy)
    assert loss_floor(8, 64) == 0.0


def test_what_was_given_stays():
    given_ = recipe(optim={"batch_size": 32}, objective={"prototypes": 256}, steps=500)
    assert resolve(given_, 900) == (given_, ())


def test_rules_follow_the_batch_that_was_given():
    resolved, reasons = resolve(recipe(optim={"batch_size": 32}), 900)
    assert numbers(resolved) == (32, 256, 1700)
    assert "optim.batch_size" not in sentences(reasons, warning=False)


def test_a_reason_is_a_sentence():
    _, reasons = resolve(recipe(schedule={"freeze_last_layer": 1e-4}), 20_000)
    assert [r.sentence for r in reasons] == [
        "optim.batch_size is 256: it suits 10,000 to 100,000 images, and there are 20,000.",
        "objective.prototypes is 8,192: for 20,000 images and 512 global crops a batch; the DINO "
        "loss can fall to 2.8.",
        "steps is 3,000: about 38 passes over 20,000 images.",
        "schedule.freeze_last_layer is 0.000333: 0.0001 of 3,000 steps is less than one step, so "
        "it is one.",
    ]


def test_more_global_crops_are_more_rows():
    resolved, _ = resolve(recipe(crops={"global_count": 4}), 5_000)
    assert resolved.objective.prototypes == 1024


def test_few_images_are_told_so():
    said = sentences(resolve(recipe(), 20)[1], warning=False)
    assert "small for Sinkhorn-Knopp" in said["optim.batch_size"]
    assert "more than the 20 images" in said["objective.prototypes"]
    assert "least that schedules need" in said["steps"]
    assert "repeats within a batch" in sentences(resolve(recipe(), 3)[1], warning=False).get(
        "optim.batch_size", ""
    )


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"objective": {"prototypes": 1024}}, "objective.prototypes", "cannot be told apart"),
        (
            {"objective": {"prototypes": 4096}, "optim": {"batch_size": 64}},
            "objective.prototypes",
            "cannot fall below log(K / 128) = 3.5: take fewer prototypes, such as 512",
        ),
        ({"optim": {"batch_size": 1000}}, "optim.batch_size", "repeats within a batch"),
        ({"optim": {"batch_size": 12}}, "optim.batch_size", "and KoLeo look within a batch"),
        (
            {"optim": {"batch_size": 12}, "objective": {"regularizer": "none"}},
            "optim.batch_size",
            "Sinkhorn-Knopp looks within a batch",
        ),
    ],
)
def test_values_that_were_given_are_warned_of(changes, key, words):
    _, reasons = resolve(recipe(**changes), 900)
    found = [r for r in reasons if r.warning and r.key == key and words in r.why]
    assert len(found) == 1
    section, name = key.split(".")
    assert found[0].value == changes[section][name]


def test_nothing_is_said_of_what_is_not_used():
    quiet = recipe(
        optim={"batch_size": 12},
        objective={"centering": "softmax", "regularizer": "none", "prototypes": 800},
    )
    assert not sentences(resolve(quiet, 900)[1], warning=True)
    heads = recipe(objective={"prototypes": 4096, "dino_weight": 0.0})
    assert not sentences(resolve(heads, 900)[1], warning=True)


@pytest.mark.parametrize("name", FRACTIONS)
def test_a_fraction_below_one_step_is_one_step(name):
    resolved, reasons = resolve(recipe(schedule={name: 1e-4}), 900)
    assert round(getattr(resolved.schedule, name) * resolved.steps) == 1
    assert "less than one step" in sentences(reasons, warning=False)[f"schedule.{name}"]


def test_a_fraction_of_nothing_stays_nothing():
    resolved, _ = resolve(recipe(schedule={"warmup": 0.0}), 900)
    assert resolved.schedule.warmup == 0.0


def test_a_backbone_held_for_most_of_the_run_is_refused():
    held = {"freeze_backbone": 0.3, "backbone_ramp": 0.21}
    with pytest.raises(RecipeError, match=r"0\.3 and schedule\.backbone_ramp 0\.21 .* half"):
        resolve(recipe(schedule=held), 900)
    for fine in (
        {"freeze_backbone": 0.3, "backbone_ramp": 0.2},
        {"freeze_backbone": 1.0},
    ):
        assert resolve(recipe(schedule=fine), 900)[0].schedule.freeze_backbone > 0


def test_settled_numbers_are_checked_against_the_rest():
    with pytest.raises(RecipeError, match=r"For 900 images.*koleo_group is 48.*batch_size is 64"):
        resolve(recipe(objective={"koleo_group": 48}), 900)


def test_no_images_are_refused():
    with pytest.raises(DataError, match="There are 0 images"):
        resolve(recipe(), 0)


def phases(*told, **changes):
    return recipe(phases=told, **changes)


def test_phases_share_batch_and_heads():
    told = phases({"name": "first"}, {"name": "second", "steps": 100, "optim": {"lr": 1e-4}})
    resolved, reasons = resolve(told, 900)
    plans = [plan for _, plan in resolved.plans()]
    assert [numbers(plan) for plan in plans] == [(64, 512, 840), (64, 512, 100)]
    assert plans[1].optim.lr == 1e-4
    assert [r.key for r in reasons] == ["optim.batch_size", "objective.prototypes", "steps"]
    assert resolve(resolved, 900) == (resolved, ())


def test_auto_inside_a_phase_is_settled_for_it():
    told = phases(
        {"name": "first", "steps": 400},
        {"name": "second", "steps": 20, "optim": {"batch_size": "auto"}},
        optim={"batch_size": 32},
        objective={"prototypes": 256},
    )
    resolved, reasons = resolve(told, 900)
    assert [plan.optim.batch_size for _, plan in resolved.plans()] == [32, 64]
    keys = [r.key for r in reasons]
    assert keys == ["phases.second.optim.batch_size", "phases.second.schedule.freeze_last_layer"]
    assert resolved.steps == 0, "no phase reads the steps around it"
    assert [phase.start for phase in resolved.phases] == [None, None]


def test_a_warning_about_what_phases_share_comes_once():
    told = phases({"name": "a"}, {"name": "b"}, objective={"prototypes": 2048})
    _, reasons = resolve(told, 900)
    assert [r.key for r in reasons if r.warning] == ["objective.prototypes"]


def test_what_the_rules_chose_is_not_warned_of():
    _, reasons = resolve(phases({"name": "a"}, {"name": "b"}), 20)
    assert not [r for r in reasons if r.warning]

"""What is said of a run, and above all what is not said of healthy ones."""

import math
from typing import Any

import pytest

from dino_adapters.pretrain.diagnosis import Finding, diagnose
from dino_adapters.pretrain.health import dead_level

K, BATCH, IMAGES = 1024, 32, 960

HEALTHY = {
    "rankme": (40.0, 60.0),
    "cls_cosine": (0.5, 0.2),
    "cls_patch_cosine": (0.2, 0.25),
    "patch_consistency": (0.9, 0.85),
    "row_entropy": (6.8, 4.0),
    "marginal_entropy": (6.9, 6.8),
    "prototypes_used": (20.0, 40.0),
    "prototypes_duplicated": (0.0, 0.1),
    "knn": (0.6, 0.65),
    "linear": (0.7, 0.74),
}
UNTRAINED: dict[str, Any] = {
    "rankme": (5.0, 40.0),
    "cls_cosine": (0.999, 0.3),
    "row_entropy": (6.93, 4.0),
}


def made_looks(count=11, steps=300, **signs) -> list[dict[str, Any]]:
    """Signs that go evenly from their first to their second number."""
    told = HEALTHY | signs
    return [
        {"step": round(steps * at / (count - 1))}
        | {f"watch/{k}": a + (b - a) * at / (count - 1) for k, (a, b) in told.items()}
        for at in range(count)
    ]


def made_steps(count=300, images=BATCH, **terms) -> list[dict[str, Any]]:
    told = {"dino_global": (6.93, 4.5), "dino_local": (6.93, 4.7), "koleo": (2.0, 0.2)} | terms
    return [
        {"step": step, "images": images * (step + 1)}
        | {k: a + (b - a) * step / (count - 1) for k, (a, b) in told.items()}
        for step in range(count)
    ]


def said(looks=(), steps=(), prototypes=K, rows=2 * BATCH, images=IMAGES, frozen_until=0):
    return diagnose(
        looks,
        steps,
        prototypes=prototypes,
        rows=rows,
        images=images,
        frozen_until=frozen_until,
    )


def kinds(*args, **options):
    return [finding.kind for finding in said(*args, **options)]


def only(*args, **options):
    (finding,) = said(*args, **options)
    return finding


# Healthy runs


@pytest.mark.parametrize("until", range(1, 12))
def test_a_healthy_run_is_left_alone_at_every_look(until):
    looks = made_looks()[:until]
    steps = made_steps()[: looks[-1]["step"]]
    assert said(looks, steps) == ()


@pytest.mark.parametrize("until", range(1, 12))
def test_a_start_from_random_weights_is_no_collapse(until):
    looks = made_looks(**UNTRAINED)[:until]
    assert said(looks, made_steps(koleo=(9.0, 0.0))[: looks[-1]["step"]]) == ()


def test_nothing_noted_is_nothing_said():
    assert said() == ()
    assert said(made_looks()[:1]) == ()
    assert said(made_looks()) == ()
    assert said((), made_steps()) == ()


def test_keys_may_come_without_their_prefix():
    looks = made_looks(rankme=(40.0, 1.0))
    plain = [{key.removeprefix("watch/"): value for key, value in look.items()} for look in looks]
    assert said(plain, made_steps()) == said(looks, made_steps()) != ()


def test_missing_numbers_are_left_out():
    looks = made_looks()
    for look in looks[3:]:
        look["watch/patch_consistency"] = math.nan
        look["watch/rankme"] = None
    steps = [{**row, "koleo": None} if row["step"] % 2 else row for row in made_steps()]
    steps.insert(7, {"step": 7, "skipped": 1, "loss": math.nan})
    steps.append({"step": 300, "skipped": 2})
    assert said(looks, steps) == ()


def test_features_alone_have_no_prototypes():
    looks = [{"step": s, "watch/rankme": 30.0, "watch/cls_cosine": 0.3} for s in (0, 100, 200)]
    steps = [{"step": s, "images": 32 * s, "cls": 1.0, "patches": 1.0} for s in range(200)]
    assert said(looks, steps, prototypes=0) == ()


# Collapse


def test_tokens_that_fell_together():
    finding = only(made_looks(cls_cosine=(0.5, 0.995)), made_steps())
    assert finding.kind == "collapse"
    assert "cosine of class tokens of different images is 0.995 (0.500 at the start" in (
        finding.sentence
    )
    assert "Try a third of optim.lr" in finding.sentence


@pytest.mark.parametrize("level", [(0.9, 0.95), (0.95, 0.985), (0.985, 0.99)])
def test_a_high_level_of_the_network_itself_is_no_collapse(level):
    assert kinds(made_looks(cls_cosine=level), made_steps()) == []


def test_one_direction_and_one_prototype():
    assert "RankMe is 1.2 (40.0 at the start" in only(made_looks(rankme=(40, 1.2))).sentence
    one = only(made_looks(marginal_entropy=(6.0, 0.1), row_entropy=(5.0, 0.05)))
    assert "one prototype is in effective use for all images" in one.sentence
    assert "log K = 6.93" in one.sentence
    assert kinds(made_looks(marginal_entropy=(1.2, 1.1), row_entropy=(1.0, 0.9))) == []


def test_a_loss_of_nothing_within_the_first_pass():
    fell = made_steps(30, dino_global=(6.9, 0.05), dino_local=(6.9, 0.05))
    finding = only((), fell)
    assert finding.kind == "collapse"
    assert "the DINO term fell to 0.05 within the first pass" in finding.sentence
    assert said((), made_steps(300, dino_global=(6.9, 0.05), dino_local=(6.9, 0.05))) == ()
    assert said((), fell, images=0) == ()


def test_all_signs_of_a_collapse_are_one_finding():
    looks = made_looks(cls_cosine=(0.5, 0.999), rankme=(40, 1), marginal_entropy=(6.9, 0.2))
    assert kinds(looks, made_steps()) == ["collapse"]


# Dead


def test_a_loss_at_log_k():
    steps = made_steps(dino_global=(6.95, 6.93), dino_local=(6.94, 6.93))
    finding = only(made_looks(), steps)
    assert finding.kind == "dead"
    assert "stood at 6.93 over the last third of the steps" in finding.sentence
    assert "(log K = 6.93, K = 1,024)" in finding.sentence
    assert "Try objective.prototypes=256, " in finding.sentence
    assert "prototype_norm" not in finding.sentence


def test_uniform_rows_explain_a_dead_loss_and_are_none():
    uniform = made_looks(row_entropy=(6.9, 6.8))
    assert said(uniform, made_steps()) == ()
    dead = made_steps(dino_global=(6.93, 6.93), dino_local=(6.93, 6.93))
    finding = only(uniform, dead)
    assert "The teacher spreads each image over all prototypes (entropy 6.80" in finding.sentence
    assert "objective.prototype_norm=1" in finding.sentence


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"dino_local": (6.93, 5.0)}, {}),  # one of the terms learns
        ({"count": 20}, {}),  # not one pass yet
        ({}, {"frozen_until": 290}),  # nor since the freeze
        ({}, {"prototypes": 0}),
    ],
)
def test_a_loss_that_need_not_move_yet(changes, options):
    terms = {"dino_global": (6.93, 6.93), "dino_local": (6.93, 6.93)}
    assert said((), made_steps(**(terms | changes)), **options) == ()


def test_few_prototypes_are_not_the_reason():
    level = (dead_level(64), dead_level(64))
    finding = only((), made_steps(dino_global=level, dino_local=level), prototypes=64)
    assert "Try a lower objective.teacher_temperature, a lower optim.lr or more" in finding.sentence


def test_unknown_numbers_of_images_and_rows():
    level: dict[str, Any] = {"dino_global": (6.93, 6.93), "dino_local": (6.93, 6.93)}
    assert kinds((), made_steps(12, **level), images=0, rows=0) == ["dead"]


def test_twins():
    finding = only(made_looks(prototypes_duplicated=(0.01, 0.7)), made_steps())
    assert finding.kind == "dead"
    assert "70 % of the 1,024 prototypes have a twin (1 % at the start" in finding.sentence
    assert "objective.prototypes=256" in finding.sentence
    assert said(made_looks(prototypes_duplicated=(0.7, 0.72)), made_steps()) == ()


# Loose, drop, drift


def test_tokens_that_never_come_apart():
    finding = only(made_looks(**UNTRAINED), made_steps(koleo=(7.3, 7.2)))
    assert finding.kind == "loose"
    assert "KoLeo stays at 7.2" in finding.sentence
    assert said((), made_steps(20, koleo=(9.0, 9.0))) == ()


def with_gain(looks, *spans):
    """The last looks get these intervals of their gain."""
    for look, (low, high) in zip(looks[-len(spans) :], spans, strict=True):
        look |= {"watch/gain": (low + high) / 2, "watch/gain_low": low, "watch/gain_high": high}
    return looks


def test_a_drop_that_the_interval_shows():
    finding = only(with_gain(made_looks(), (-0.04, -0.01), (-0.06, -0.02)), made_steps())
    assert finding.kind == "drop"
    assert "-4.0 points from the start (95 % interval -6.0 to -2.0)" in finding.sentence
    assert kinds(with_gain(made_looks(), (-0.2, -0.06))) == ["drop"]


@pytest.mark.parametrize(
    "spans",
    [
        [(-0.04, -0.01)],  # one small one of eleven comes by chance
        [(-0.04, -0.01), (-0.03, 0.01)],
        [(-0.3, -0.2), (-0.03, 0.01)],  # it came back
        [(0.0, 0.0), (0.01, 0.05)],
    ],
)
def test_drops_that_nothing_shows(spans):
    assert said(with_gain(made_looks(), *spans), made_steps()) == ()


def test_a_drop_without_an_interval_must_be_large():
    finding = only(made_looks(knn=(0.6, 0.5), linear=(0.7, 0.66)), made_steps())
    assert finding.kind == "drop"
    assert "k-NN 50.0 % (60.0 % at the start), linear probe 66.0 %" in finding.sentence
    assert said(made_looks(knn=(0.6, 0.56), linear=(0.7, 0.66)), made_steps()) == ()
    fallen = made_looks(knn=(0.6, 0.4), linear=(0.7, 0.5))
    assert said(with_gain(fallen, (-0.1, 0.02)), made_steps()) == ()
    too_few = with_gain(fallen, (math.nan, math.nan))
    too_few[-1]["watch/gain"] = -0.2
    assert said(too_few, made_steps()) == ()


def test_a_frozen_backbone_cannot_have_dropped():
    looks = made_looks(knn=(0.6, 0.4), linear=(0.7, 0.5), cls_cosine=(0.2, 0.999))
    assert said(looks, frozen_until=300) == ()
    assert kinds(looks, frozen_until=299) == ["collapse", "drop"]


def test_drift():
    finding = only(made_looks(cls_patch_cosine=(0.2, 0.6), patch_consistency=(0.9, 0.6)))
    assert finding.kind == "drift"
    assert "since step 0" in finding.sentence
    assert "fell from 0.90 to 0.60" in finding.sentence
    assert "class token went from 0.20 to 0.60" in finding.sentence
    assert "Gram anchoring" in finding.sentence


@pytest.mark.parametrize(
    "signs",
    [
        {"cls_patch_cosine": (0.2, 0.6)},
        {"patch_consistency": (0.9, 0.6)},
        {"cls_patch_cosine": (0.2, 0.27), "patch_consistency": (0.9, 0.6)},
        {"cls_patch_cosine": (0.6, 0.2), "patch_consistency": (0.6, 0.9)},
        # From random weights: there was nothing to lose before tokens came apart.
        {
            "cls_patch_cosine": (0.2, 0.6),
            "patch_consistency": (0.9, 0.6),
            "cls_cosine": (0.9999, 0.979),
        },
    ],
)
def test_what_is_no_drift(signs):
    assert said(made_looks(**signs)) == ()


def test_maps_that_are_lost_are_a_drift_whatever_the_class_token_does():
    assert kinds(made_looks(patch_consistency=(0.8, 0.3))) == ["drift"]


def test_a_drift_in_one_look_may_be_chance():
    looks = made_looks()
    looks[-1] |= {"watch/cls_patch_cosine": 0.7, "watch/patch_consistency": 0.4}
    assert said(looks) == ()


# What follows


def test_what_is_an_alarm():
    kinds = ("collapse", "drop", "dead", "drift", "loose")
    assert [Finding(kind, "").is_alarm for kind in kinds] == [True, True, False, False, False]


def test_the_worst_comes_first_and_every_sentence_says_what_to_try():
    looks = made_looks(
        cls_cosine=(0.5, 0.999),
        cls_patch_cosine=(0.2, 0.9),
        patch_consistency=(0.9, 0.2),
        prototypes_duplicated=(0.0, 0.9),
    )
    looks = with_gain(looks, (-0.3, -0.2), (-0.3, -0.2))
    flat: dict[str, Any] = {
        "dino_global": (6.93, 6.93),
        "dino_local": (6.93, 6.93),
        "koleo": (9.0, 9.0),
    }
    found = said(looks, made_steps(**flat))
    assert [finding.kind for finding in found] == [
        "collapse",
        "drop",
        "dead",
        "dead",
        "loose",
    ]
    for finding in found:
        assert any(word in finding.sentence for word in ("Try ", "try "))
        assert finding.sentence.endswith(".")
        assert any(letter.isdigit() for letter in finding.sentence)

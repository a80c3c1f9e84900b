"""Verdicts on planted networks: right where they differ, silent where they do not."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dino_adapters.contracts import DataError
from dino_adapters.data import ImageSource
from dino_adapters.measure.intervals import paired_bootstrap
from dino_adapters.pretrain import gate
from dino_adapters.pretrain.answers import (
    held_out_knn,
    held_out_linear,
    knn,
    linear_probe,
    mean_recall,
)
from dino_adapters.pretrain.gate import (
    Paired,
    agreed,
    change_of_selection,
    delivered,
    delivery_sentence,
    early_stop,
    judge,
    unlabelled,
    unopposed,
)
from dino_adapters.pretrain.labelled import TOO_FEW, labelled_set
from dino_adapters.pretrain.probe import Look
from dino_adapters.pretrain.verdict import Verdict
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.running import GateRecipe
from dino_adapters.runtime.console import Notices

COUNTS = {"cat": 240, "dog": 120, "owl": 60}


def look_of(answers, labelled, held_out=None, answered=None):
    """A look with these answers `(2, queries)`, and these about the gallery `(2, gallery)`."""
    answers = np.asarray(answers, dtype=bool)
    labels = labelled.labels_of(labelled.queries)
    knn, linear = (mean_recall(row, labels) for row in answers)
    chosen_by = np.zeros((2, 0), dtype=bool) if held_out is None else held_out
    there = np.ones(answers.shape[1], bool) if answered is None else answered
    return Look(
        size=16,
        selection=0.5,
        scores={16: 0.5},
        strength=0.1,
        answers=answers,
        answered=there,
        held_out=chosen_by,
        asked=np.ones(chosen_by.shape[1], dtype=bool),
        knn=knn,
        linear=linear,
        labelled=labelled.digest,
    )


def planted(labelled, apart, seed):
    """The look at a network whose classes are so far apart, and whose groups lie together."""
    rng = np.random.default_rng(seed)
    names = sorted(set(labelled.labels.values()))
    shift = {group: 0.5 * rng.normal(size=10) for group in sorted(set(labelled.groups.values()))}

    def vectors(keys):
        codes = [names.index(labelled.labels[key]) for key in keys]
        own = np.stack([shift[labelled.groups[key]] for key in keys])
        x = rng.normal(size=(len(keys), 10)) + own + apart * np.eye(len(names), 10)[codes]
        return x.astype(np.float32)

    bank, x = vectors(labelled.gallery), vectors(labelled.queries)
    labels, groups = labelled.labels_of(labelled.gallery), labelled.groups_of(labelled.gallery)
    truth = labelled.labels_of(labelled.queries)
    said, _ = linear_probe(bank, labels, groups, x, Notices())
    answers = np.stack([knn(bank, labels, x) == truth, said == truth])
    held_out = [held_out_knn(bank, labels, groups)]
    held_out.append(held_out_linear(bank, labels, groups, Notices()))
    return look_of(answers, labelled, np.stack(held_out))


@pytest.fixture(scope="module")
def images():
    """Three classes, one four times as frequent as another, in groups of three."""
    recipe = PretrainRecipe.model_validate({"data": {"source": "/data"}})
    labels = {f"{name}/{i:03d}.png": name for name, count in COUNTS.items() for i in range(count)}
    groups = {key: f"{label}-{int(key[4:7]) // 3}" for key, label in labels.items()}
    source = ImageSource(Path("/data"), list(labels), {}, labels=labels, groups=groups)
    found = labelled_set(recipe, source, Notices())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("start", "now", "kind"), [(1.4, 2.4, "better"), (2.4, 1.4, "worse"), (1.8, 1.8, "same")]
)
def test_planted_networks_get_their_verdict(images, start, now, kind):
    """Over 20 pairs of networks, all noise drawn anew."""
    found = Counter(
        judge(planted(images, start, 2 * seed), planted(images, now, 2 * seed + 1), images).kind
        for seed in range(20)
    )
    assert found[kind] >= 18
    opposite = {"better": "worse", "worse": "better"}
    assert found[opposite.get(kind, "unknown")] == 0


@pytest.mark.parametrize(
    ("groups", "size", "classes", "pure"),
    [(12, 5, 3, False), (21, 10, 21, True), (60, 4, 5, False)],
)
def test_equal_networks_are_seldom_called_better(labelled_of, groups, size, classes, pure):
    """Two draws of one law, with a common difficulty and each with its own luck in every group.

    A class that is one group is the hard case: averaging over the classes of a resample, as
    plain balanced accuracy does, calls 7 % of such pairs better.
    """
    number = np.repeat(np.arange(groups), size)
    found = Counter()
    for seed in range(200):
        rng = np.random.default_rng([seed, groups])
        labels = number % classes if pure else rng.integers(0, classes, len(number))
        images = labelled_of(labels, number)
        item = 1 + 1.5 * rng.normal(size=len(number)) + rng.normal(size=groups)[number]
        pair = []
        for _ in range(2):
            right = 1 / (1 + np.exp(-item - rng.normal(size=groups)[number]))
            pair.append(look_of(rng.random((2, len(number))) < right, images))
        found[judge(pair[0], pair[1], images, seed=seed).kind] += 1
    assert found["better"] <= 10
    assert found["worse"] <= 10
    assert found["same"] >= 185


def test_the_same_answers_are_no_difference(images):
    start = planted(images, 1.8, 0)
    verdict = judge(start, start, images)
    assert (verdict.kind, verdict.difference, verdict.low) == ("same", 0, None)
    assert "only 0 of" in verdict.sentence


def test_the_difference_is_of_balanced_accuracy(images):
    start, now = planted(images, 1.2, 0), planted(images, 2.4, 1)
    verdict = judge(start, now, images)
    assert verdict.knn == (start.knn, now.knn)
    assert verdict.linear == (start.linear, now.linear)
    expected = (now.knn - start.knn + now.linear - start.linear) / 2
    assert verdict.difference == pytest.approx(expected)
    labels, groups = images.labels_of(images.queries), images.groups_of(images.queries)
    value, low, high = paired_bootstrap(
        now.answers, start.answers, groups, labels=labels, over_draws=False
    )
    assert verdict.difference == pytest.approx(value)
    assert verdict.difference is not None
    # Many groups of each class: both ways of weighing agree.
    assert verdict.low == pytest.approx(low, abs=0.02)
    assert verdict.high == pytest.approx(high, abs=0.02)
    assert verdict.queries == len(images.queries)
    assert verdict.groups == len(set(groups))
    assert judge(start, now, images) == verdict
    turned = judge(now, start, images)
    assert turned.difference == pytest.approx(-verdict.difference)
    assert turned.kind == "worse"


def test_rare_classes_weigh_as_much_as_others(labelled_of):
    """Better on five images of the rare class, worse on five of forty-five of the other."""
    labels = np.array(["a"] * 45 + ["b"] * 5)
    images = labelled_of(labels, np.arange(50))
    start, now = np.ones((2, 50), bool), np.ones((2, 50), bool)
    start[:, 45:] = False
    now[:, :5] = False
    verdict = judge(look_of(start, images), look_of(now, images), images)
    assert verdict.difference == pytest.approx((1.0 - 5 / 45) / 2)
    assert verdict.kind == "better"


def test_images_that_one_look_could_not_read_count_for_neither(labelled_of):
    images = labelled_of(np.tile(["a", "b"], 20), np.arange(40))
    there = np.arange(40) >= 10
    start = look_of(np.ones((2, 40)), images)
    now = look_of(np.tile(there, (2, 1)), images, answered=there)
    verdict = judge(start, now, images)
    assert (verdict.difference, verdict.queries, verdict.kind) == (0.0, 30, "same")


def test_few_groups_leave_it_open(labelled_of):
    images = labelled_of(np.tile(["a", "b"], 30), np.arange(60) // 7)
    start, now = look_of(np.zeros((2, 60)), images), look_of(np.ones((2, 60)), images)
    verdict = judge(start, now, images)
    assert (verdict.kind, verdict.low, verdict.high, verdict.groups) == ("unknown", None, None, 9)
    assert verdict.difference == 1.0
    assert "+100.0 points, and over 9 groups of images an interval would be" in verdict.sentence
    assert verdict.sentence.endswith("10 are needed: label images of more groups.")
    ten = labelled_of(np.tile(["a", "b"], 30), np.arange(60) // 6)
    verdict = judge(look_of(np.zeros((2, 60)), ten), look_of(np.ones((2, 60)), ten), ten)
    assert verdict.kind == "better"


def test_few_groups_get_a_wider_interval():
    """As Hesterberg's table 1 of the level that percentiles need: 0.9966 of 5, 0.975 of 20."""
    tails = {n: (1 - gate._expanded(n)) / 2 for n in (10, 20, 40, 1000)}
    assert list(tails.values()) == sorted(tails.values())
    assert tails[1000] == pytest.approx(0.025, abs=0.0003)
    assert tails[10] < 0.009


def test_sentences(labelled_of):
    images = labelled_of(np.tile(["a", "b"], 30), np.arange(60) // 2)
    rng = np.random.default_rng(0)
    start, now = look_of(rng.random((2, 60)) < 0.3, images), look_of(np.ones((2, 60)), images)
    verdict = judge(start, now, images)
    numbers = (verdict.difference, verdict.low, verdict.high)
    points, low, high = (f"{100 * number:+.1f}" for number in numbers if number is not None)
    assert verdict.sentence == (
        f"Better than the start: {points} points (95 % interval {low} to {high}; "
        "k-NN and linear probe averaged, read at 16 px, 60 images in 30 groups that nothing was "
        "chosen on)."
    )
    assert judge(now, start, images).sentence.startswith("Worse than the start: -")
    assert judge(now, now, images).sentence.startswith("No difference to the start is shown: +0.0")
    alone = labelled_of(np.tile(["a", "b"], 30), np.arange(60), seen=True)
    said = judge(look_of(start.answers, alone), look_of(now.answers, alone), alone).sentence
    assert said.endswith("60 images whose labels nothing was chosen by).")
    larger = judge(replace(start, size=24), now, images).sentence
    assert "read at 16 px and the start at 24 px, 60 images" in larger


def test_a_change_of_size_is_no_gain(labelled_of):
    """The start, read at the size that suits the result, has as many right: nothing was won."""
    images = labelled_of(np.tile(["a", "b"], 60), np.arange(120))
    rng = np.random.default_rng(0)
    own = replace(look_of(rng.random((2, 120)) < 0.5, images), size=24)
    rival, now = (look_of(rng.random((2, 120)) < 0.8, images) for _ in range(2))
    assert judge(own, now, images).kind == "better"
    verdict = agreed(judge(own, now, images), judge(rival, now, images))
    assert (verdict.kind, verdict.sizes) == ("same", (16, 16))
    better = judge(own, now, images)
    assert agreed(better, better) == better
    worse = judge(rival, look_of(own.answers, images), images)
    both = agreed(better, worse)
    assert both.kind == "same"
    assert both.sentence.startswith("No difference to the start is shown: this network is")
    for one, size in ((better, 24), (worse, 16)):
        assert one.difference is not None
        assert f"read at {size} px: {100 * one.difference:+.1f} points" in both.sentence
    assert agreed(better, replace(worse, kind="unknown")).kind == "unknown"


def test_both_readings_of_the_start_are_told(labelled_of):
    images = labelled_of(np.tile(["a", "b"], 60), np.arange(120))
    rng = np.random.default_rng(0)
    own = replace(look_of(rng.random((2, 120)) < 0.5, images), size=24)
    rival, now = (look_of(rng.random((2, 120)) < 0.8, images) for _ in range(2))
    first, second = judge(own, now, images), judge(rival, now, images)
    verdict = agreed(first, second)
    assert verdict.other == (first.difference, first.low, first.high)
    assert verdict.difference == second.difference
    assert verdict.sentence.startswith(second.sentence)
    # What remains is the other reading, in the words of its own sentence.
    own_words = first.sentence.removeprefix("Better than the start: ").split(" (95 %")[0]
    rest = verdict.sentence.removeprefix(second.sentence)
    assert rest.startswith(f" With the start read at 24 px: {own_words} (95 % interval ")
    # Where answers hardly changed, there is no interval to tell.
    few = look_of(now.answers ^ (np.arange(120) < 3), images)
    told = agreed(judge(own, now, images), judge(few, now, images))
    assert "of 120 groups of images are answered otherwise" in told.sentence


def test_of_two_gains_the_smaller_is_told(labelled_of):
    images = labelled_of(np.tile(["a", "b"], 60), np.arange(120))
    rng = np.random.default_rng(0)
    poor, fair = (look_of(rng.random((2, 120)) < share, images) for share in (0.3, 0.6))
    poor = replace(poor, size=24)
    now = look_of(np.ones((2, 120)), images)
    verdicts = judge(poor, now, images), judge(fair, now, images)
    assert [one.kind for one in verdicts] == ["better", "better"]
    for order in (verdicts, verdicts[::-1]):
        found = agreed(*order)
        assert (found.kind, found.difference) == ("better", verdicts[1].difference)


def test_a_gain_that_the_gallery_contradicts_is_not_shown(labelled_of):
    """One kind of image gained, and those that the result was chosen by, of many kinds, lost."""
    images = labelled_of(np.tile(["a", "b"], 60), np.arange(120))
    right, wrong = look_of(np.ones((2, 120)), images), look_of(np.zeros((2, 120)), images)
    better, worse = judge(wrong, right, images), judge(right, wrong, images)
    fall, gain = (
        Paired(
            ((0.8, 0.8 + change), (0.8, 0.8 + change)),
            change,
            change - 0.02,
            change + 0.02,
            90,
            90,
            20,
        )
        for change in (-0.03, 0.03)
    )
    opposed = unopposed(better, fall, seen=False)
    assert (better.kind, opposed.kind) == ("better", "same")
    assert delivered(opposed, GateRecipe()) == "start"
    assert opposed.sentence == (
        "No difference to the start is shown: +100.0 points (95 % interval +100.0 to +100.0) on "
        "120 images that nothing was chosen on, but -3.0 points (95 % interval -5.0 to -1.0) on "
        "the 90 that reading size and best look were chosen by (k-NN and linear probe averaged, "
        "read at 16 px)."
    )
    assert "120 images whose labels nothing" in unopposed(better, fall, seen=True).sentence
    unclear, unknown = replace(fall, high=0.001), replace(fall, low=None, high=None)
    for verdict in (better, worse):
        for other in (gain, unclear, unknown):
            told = unopposed(verdict, other, seen=False)
            assert told == replace(verdict, chosen_by=(other.difference, other.low, other.high))
    assert unopposed(worse, fall, seen=False).kind == "worse"


@pytest.mark.parametrize("changed", [0, 1, 4, 5, 6])
def test_few_changed_groups_show_nothing(labelled_of, changed):
    """Five of five for the better happen by chance in one case of sixteen, both sides counted."""
    images = labelled_of(np.tile(["a", "b"], 60), np.arange(120))
    before = np.zeros((2, 120), dtype=bool)
    after = before.copy()
    after[:, :changed] = True
    verdict = judge(look_of(before, images), look_of(after, images), images)
    assert verdict.difference == pytest.approx(changed / 120)
    assert verdict.kind == ("better" if changed == 6 else "same")
    assert (verdict.low is None) == (changed < 6)
    if changed < 6:
        assert f"only {changed} of 120 groups of images are answered otherwise" in verdict.sentence


def test_looks_at_other_images_are_refused(labelled_of):
    images, others = (
        labelled_of(list("ab" * 30), range(60)),
        labelled_of(list("ba" * 30), range(60)),
    )
    with pytest.raises(DataError, match="different labelled images"):
        judge(look_of(np.ones((2, 60)), images), look_of(np.ones((2, 60)), others), images)


def test_verdicts_are_json_safe(images):
    verdict = judge(planted(images, 1.5, 0), planted(images, 1.5, 1), images)
    for one in (verdict, unlabelled()):
        held = json.loads(json.dumps(one.as_json(), allow_nan=False))
        told = {**held}
        for name in ("knn", "linear", "sizes", "chosen_by"):
            told[name] = None if held[name] is None else tuple(held[name])
        assert Verdict(**told) == one


def test_without_labels_the_reason_is_said():
    assert unlabelled().sentence.startswith("Open: nothing is labelled, so nothing shows whether")
    assert "monitor.labels" in unlabelled().sentence
    notices = Notices()
    notices.add(f"{TOO_FEW}: 4 of 1 classes are left")
    said = unlabelled(notices).sentence
    assert said.startswith(f"Open: there are {TOO_FEW}: 4 of 1 classes are left, so nothing shows")
    assert "Label more images, of more classes or groups," in said
    assert unlabelled(Notices()).kind == "unknown"


@pytest.mark.parametrize("unshown", ["start", "continued"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("better", "continued"), ("worse", "start"), ("same", None), ("unknown", None)],
)
def test_what_is_delivered(kind, expected, unshown):
    told = GateRecipe(unshown=unshown)
    verdict = replace(unlabelled(), kind=kind)
    chosen = delivered(verdict, told)
    assert chosen == (expected or unshown)
    said = delivery_sentence(verdict, told, 18)
    assert "ontinued network of step 18" in said
    other = "start" if chosen == "continued" else "continued"
    assert f"is in candidates/{other}." in said
    assert (f"gate.unshown={unshown}" in said) == (expected is None)


@pytest.mark.parametrize(
    ("scores", "patience", "stops"),
    [
        ([0.5, 0.4, 0.3], 0, False),
        ([0.5, 0.4, 0.3], 2, True),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.5, 0.5], 2, True),  # as good is no new best
        ([0.5, 0.4], 2, False),
        ([0.5, 0.6, 0.5, 0.5], 2, True),
        ([], 1, False),
    ],
)
def test_early_stop(scores, patience, stops):
    assert early_stop(scores, patience) is stops


def test_a_fall_is_one_that_the_gallery_shows(images):
    """On the way only the gallery decides, by the same paired comparison as the verdict."""
    good, alike, poor = (planted(images, apart, seed) for apart, seed in [(2, 0), (2, 1), (0.5, 2)])
    same, fell = (change_of_selection(good, now, images) for now in (alike, poor))
    assert (same.low or 0) < 0 < (same.high or 0)
    assert (fell.high or 0) < 0
    assert fell.queries == len(images.gallery)
    labels = images.labels_of(images.gallery)
    expected = [mean_recall(row, labels) for row in poor.held_out]
    assert [now for _, now in fell.probes] == pytest.approx(expected)
    # What the queries say has no part in it.
    silent = replace(poor, answers=np.ones_like(poor.answers))
    assert change_of_selection(good, silent, images) == fell

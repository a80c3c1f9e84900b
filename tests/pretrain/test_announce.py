"""What is said of the images that will judge, before anything is spent."""

import pytest

from dino_adapters.pretrain.announce import judging
from dino_adapters.pretrain.labelled import TOO_FEW
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.runtime.console import Notices


@pytest.fixture
def recipe():
    return PretrainRecipe.model_validate(
        {"data": {"source": "x"}, "model": {"source": "vitmicro8"}, "gate": {}}
    )


@pytest.fixture
def make(labelled_of):
    """Images of the classes a and b in turn, one to choose by and one to judge on of each group."""
    return lambda groups: labelled_of(
        ["ab"[i % 2] for i in range(len(groups))], groups, gallery=True
    )


def test_how_much_the_labels_can_show(recipe, make):
    (said,) = judging(recipe, make(range(40)), Notices())
    # 1.96 standard errors of a mean of 40 numbers of which one in ten is 1 or -1.
    assert said == (
        "40 labelled images to choose by, 40 to judge on: an interval of about ± 9.8 points, if "
        "one answer in ten changes"
    )
    (said,) = judging(recipe, make([index // 4 for index in range(40)]), Notices())
    assert "40 to judge on in 10 groups: an interval" in said
    assert said.endswith("and wider where images of a group change together")


def test_a_class_of_one_group_cannot_show_how_groups_differ(recipe, make):
    groups = ["all" if index % 2 else str(index) for index in range(40)]
    _, said = judging(recipe, make(groups), Notices())
    assert said.startswith(
        "1 of 2 classes have one group to judge on (first: 'b'), so the interval"
    )


def test_too_few_groups_and_none(recipe, make):
    (said,) = judging(recipe, make([index % 6 for index in range(40)]), Notices())
    assert "the gate needs 10 groups to show a difference" in said
    (said,) = judging(recipe, None, Notices())
    assert "will export the start" in said
    notices = Notices()
    notices.add(f"{TOO_FEW}: all 9 are of the class 'a'")
    (said,) = judging(recipe, None, notices)
    assert f"nothing to judge by ({TOO_FEW}: all 9 are of the class 'a')" in said
    assert judging(recipe.changed({"gate": None}), None, notices) == ()

"""Settings that do not go together are refused when a recipe is read."""

import pytest
from pydantic import ValidationError

from dino_adapters.pretrain.optim import Timetable
from dino_adapters.recipes.pretrain import PretrainRecipe

MIXTURE = [{"global_size": 96, "local_size": 64}]
FINER = [MIXTURE[0] | {"gram_size": 128}]


def recipe(**told):
    return PretrainRecipe.model_validate({"data": {"source": "x"}, **told})


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"gram": {"teacher": "live", "size": 96}}, "size is given, and with teacher=live"),
        ({"gram": {"teacher": "live", "refresh_every": 2}}, "refresh_every is given"),
        ({"gram": {"max_refreshes": 3}}, "without refresh_every"),
        ({"gram": {"copy_at": 10}, "steps": 10}, "gram.copy_at is 10 and there are 10 steps"),
        ({"gram": {"size": 96}, "crops": {"mixture": MIXTURE}}, "Leave gram.size out"),
        ({"crops": {"mixture": [{"global_size": 32, "local_size": 64}]}}, "local_size is 64"),
        ({"objective": {"koleo_group": 3}, "optim": {"batch_size": 4}}, "divides the batch"),
        ({"objective": {"koleo_neighbours": 4}, "optim": {"batch_size": 4}}, "4 among 4 images"),
        ({"gram": {"teacher": "live"}, "crops": {"mixture": FINER}}, "gram_size is given"),
        ({"objective": {"shared_head": True, "ibot_prototypes": 8}}, "no head of its own"),
        ({"gram": {}, "distill": {"students": {"a": {"source": "x"}}}}, "both given"),
    ],
)
def test_what_does_not_go_together_is_refused(told, sentence):
    with pytest.raises(ValidationError, match=sentence):
        recipe(**told)


def test_sections_of_phases_are_held_against_the_phase_and_not_the_recipe():
    made = recipe(steps=5, gram={"copy_at": 10}, phases=[{"name": "long", "steps": 20}])
    assert [plan.steps for _, plan in made.plans()] == [20]
    with pytest.raises(ValidationError, match="copy_at is 10 and there are 5 steps"):
        recipe(steps=20, gram={"copy_at": 10}, phases=[{"name": "short", "steps": 5}])


def test_a_mixture_is_held_against_its_own_sizes():
    made = recipe(crops={"mixture": MIXTURE, "local_size": 64, "global_size": 64})
    assert made.crops.mixture[0].local_size == 64


def test_without_koleo_its_settings_are_not_held_against_the_batch():
    made = recipe(objective={"regularizer": "none", "koleo_group": 3}, optim={"batch_size": 4})
    assert made.objective.koleo_group == 3


def test_without_a_warmup_the_temperature_is_warm_from_the_first_step():
    cold = recipe(schedule={"temperature_warmup": 0.5}, steps=10)
    warm = recipe(schedule={"temperature_warmup": 0.0}, steps=10)
    assert Timetable(cold).at(0).teacher_temperature == pytest.approx(0.04)
    assert Timetable(cold).at(5).teacher_temperature == pytest.approx(0.07)
    assert Timetable(warm).at(0).teacher_temperature == pytest.approx(0.07)


def test_phases_have_seeds_of_their_own():
    made = recipe(phases=[{"name": "a"}, {"name": "b"}], seed=5)
    first, second = (plan.seed for _, plan in made.plans())
    assert first == 5
    assert second not in (0, 5)

"""The Gram teacher: where it comes from, when it is replaced, what it is compared with."""

import random

import pytest
import torch
from safetensors.torch import load_file

from dino_adapters.backbones import build_network
from dino_adapters.contracts import RecipeError
from dino_adapters.pretrain import gram_loss, pretrain, resize_tokens
from dino_adapters.pretrain.anchor import GramAnchor, refresh_is_due
from dino_adapters.pretrain.assemble import assemble
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.loop import one_step
from dino_adapters.pretrain.masks import block_masks
from dino_adapters.pretrain.optim import Knobs, Timetable
from dino_adapters.pretrain.origin import Origin
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.recipes.teachers import GramRecipe
from dino_adapters.runtime.runfolder import RunFolder

SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 1, "rope_rescale": None, "layerscale": 1.0}
IMAGES = 2
MOVING = {"optim": {"lr": 0.01}, "schedule": {"momentum": (0.5, 0.9), "warmup": 0.0}}


def network(seed=0):
    return build_network("vitmicro8", architecture=SMALL, seed=seed)[0]


def knobs(step=0, **others):
    return Knobs(step, 1e-3, 1e-3, 0.04, 0.5, 0.05, **others)


def crops(gram_size=None):
    draws = torch.Generator().manual_seed(2)
    larger = None if gram_size is None else torch.randn(4, 3, gram_size, gram_size, generator=draws)
    return Crops(
        torch.randn(4, 3, 32, 32, generator=draws),
        torch.randn(4, 3, 16, 16, generator=draws),
        block_masks(4, (4, 4), random.Random(0)),
        IMAGES,
        larger,
    )


def learner(gram_network=None, **gram):
    told = {"prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8, "prototype_norm": 1.0}
    made = SelfDistillation(
        network(1),
        ObjectiveRecipe.model_validate(told),
        seed=0,
        device=torch.device("cpu"),
        bf16=False,
        gram=GramRecipe.model_validate(gram),
        gram_network=gram_network,
    )
    draws = torch.Generator().manual_seed(5)
    for parameter in made.teacher.parameters():  # as after some steps
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return made


def same(ours, theirs):
    assert set(ours) == set(theirs)
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_refreshes_are_those_that_a_counter_makes():
    assert not any(refresh_is_due(step, GramRecipe()) for step in range(40))
    for every in (1, 2, 3, 5, 7):
        for first in (0, 1, 2, 5, 6, 7, 13):
            for most in (None, 0, 1, 2, 4):
                recipe = GramRecipe(refresh_every=every, first_refresh=first, max_refreshes=most)
                made = 0
                for step in range(40):
                    done = step + 1
                    due = done >= first and done % every == 0
                    due = due and (most is None or made < most)
                    made += due
                    assert refresh_is_due(step, recipe) == due, (every, first, most, step)


def test_ema_is_a_copy_taken_at_its_step_and_kept():
    average = network()
    anchor = GramAnchor(GramRecipe(copy_at=2), None, average)
    assert anchor.network is not None
    start = copied(average)
    for step in range(4):
        for parameter in average.parameters():
            parameter.data.add_(1.0)
        anchor.before(step)
        at_two = copied(average) if step == 2 else None
        if step < 2:
            assert same(anchor.network.state_dict(), start)
        elif at_two is not None:
            start = at_two
            assert same(anchor.network.state_dict(), at_two)
        else:
            assert same(anchor.network.state_dict(), start)
        anchor.after(step)
    assert not any(p.requires_grad for p in anchor.network.parameters())
    assert not anchor.network.training


def test_ema_is_copied_before_the_first_step_unless_told_otherwise():
    assert GramAnchor(GramRecipe(), None, network()).copy_at == 0
    assert GramAnchor(GramRecipe(teacher="x"), network(3), network()).copy_at is None


def test_a_refresh_takes_the_moving_average_after_the_step():
    average = network()
    anchor = GramAnchor(GramRecipe(teacher="x", refresh_every=2), network(3), average)
    assert anchor.network is not None
    first = copied(anchor.network)
    anchor.before(0)
    anchor.after(0)
    assert same(anchor.network.state_dict(), first)
    anchor.after(1)
    assert same(anchor.network.state_dict(), average.state_dict())


def test_the_term_is_the_gram_loss_of_tokens_brought_to_the_students_grid():
    gram, given = network(7), crops(gram_size=64)
    made = learner(gram, teacher="x", weight=1.5)
    step = made.step(given, knobs(gram_weight=1.5))
    with torch.no_grad():
        seen = gram(given.gram_crops)
    wanted = resize_tokens(seen.patches, (8, 8), (4, 4))
    assert step.gram is not None
    torch.testing.assert_close(step.gram, wanted)
    value = gram_loss(step.student.patches, wanted)
    torch.testing.assert_close(step.losses.terms["gram"], value)
    without = made.step(given, knobs()).losses
    assert "gram" not in without.terms
    torch.testing.assert_close(step.losses.total, without.total + 1.5 * value)


@pytest.mark.parametrize("tokens", ["masked", "unmasked"])
def test_chosen_tokens_are_compared_over_the_batch(tokens):
    given = crops()
    made = learner(network(7), teacher="x", tokens=tokens)
    step = made.step(given, knobs(gram_weight=1.0))
    assert given.masks is not None
    chosen = given.masks if tokens == "masked" else ~given.masks
    assert step.gram is not None
    mine, theirs = step.student.patches[chosen], step.gram[chosen]
    value = gram_loss(mine, theirs, level="batch")
    torch.testing.assert_close(step.losses.terms["gram"], value)


def test_live_is_the_moving_average_itself_and_costs_no_network():
    made, given = learner(teacher="live"), crops()
    assert made.gram is not None
    assert made.gram.network is None
    assert "gram" not in made.state()
    step = made.step(given, knobs(gram_weight=1.0))
    assert step.gram is step.teacher.patches
    with torch.no_grad():
        wanted = made.teacher["backbone"](given.global_crops).patches
    torch.testing.assert_close(step.gram, wanted)


def test_gradients_reach_the_student_alone():
    gram = network(7)
    made = learner(gram, teacher="x")
    made.step(crops(), knobs(gram_weight=1.0)).losses.terms["gram"].backward()
    assert made.gram is not None
    assert made.gram.network is not None
    frozen = [*made.gram.network.parameters(), *made.teacher.parameters()]
    assert all(p.grad is None for p in frozen)
    assert any(p.grad is not None for p in made.student["backbone"].parameters())


def test_the_gram_teacher_is_kept_with_the_state():
    made, other = learner(network(7), teacher="x"), learner(network(8), teacher="x")
    other.load_state(made.state())
    assert made.gram is not None
    assert other.gram is not None
    assert made.gram.network is not None
    assert other.gram.network is not None
    assert same(other.gram.network.state_dict(), made.gram.network.state_dict())


def test_it_comes_from_a_file_a_phase_or_its_snapshot(tiny, tmp_path):
    earlier = RunFolder(tmp_path / "a")
    pretrain(tiny(checkpoint={"snapshots": 2}, **MOVING), earlier, quiet=True)
    snapshot = earlier.path / "snapshots" / "step_00000002"
    cases = {"a": earlier.export, "a@2": snapshot, str(snapshot): snapshot}
    assert not same(*(load_file(p / "model.safetensors") for p in (earlier.export, snapshot)))
    for index, (word, export) in enumerate(cases.items()):
        recipe = tiny(gram={"teacher": word}, steps=1)
        folder = RunFolder(tmp_path / f"b{index}")
        run = assemble(recipe, folder, resume=False, origin=Origin("fresh", {"a": earlier}))
        assert isinstance(run.learner, SelfDistillation)
        assert run.learner.gram is not None
        assert run.learner.gram.network is not None
        held = run.learner.gram.network.state_dict()
        assert same(held, load_file(export / "model.safetensors")), word
        ((step, images),) = run.batches()
        found = one_step(run, run.crops(step, images), Timetable(recipe).at(step))
        assert found.losses.terms["gram"] > 0
        assert same(held, load_file(export / "model.safetensors")), word


def test_a_gram_teacher_of_another_width_is_refused(tiny, tmp_path):
    wide = pretrain(
        tiny(model={"architecture": {"embed_dim": 32}}, steps=1),
        RunFolder(tmp_path / "w"),
        quiet=True,
    )
    with pytest.raises(
        RecipeError, match="has width 32, depth 2 and patches of 8 px, the student width 24"
    ):
        pretrain(tiny(gram={"teacher": str(wide)}), RunFolder(tmp_path / "run"), quiet=True)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))

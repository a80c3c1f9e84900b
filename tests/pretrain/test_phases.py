"""Several phases in one run: what each starts from, resuming, and what is refused beforehand."""

import json
import shutil
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from dino_adapters.backbones import build_network, load_backbone
from dino_adapters.backbones.save import LICENCE_FILE
from dino_adapters.backbones.weights import DINOV3_LICENCE_ID
from dino_adapters.contracts import (
    CheckpointError,
    DinoAdaptersError,
    RecipeError,
    WeightsError,
)
from dino_adapters.pretrain import checkpoint, phases, pretrain
from dino_adapters.pretrain.assemble import assemble
from dino_adapters.pretrain.distill import Distillation
from dino_adapters.pretrain.flat_state import unflatten
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.loop import one_step
from dino_adapters.pretrain.optim import Timetable
from dino_adapters.pretrain.origin import FRESH, Origin
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.read import read_recipe
from dino_adapters.runtime.console import Notices
from dino_adapters.runtime.runfolder import RunFolder
from dino_adapters.runtime.world import ALONE

VIT = {"source": "vitmicro8", "architecture": {"embed_dim": 16, "num_heads": 2, "depth": 1}}
CNX = {
    "source": "convnext_tiny",
    "architecture": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}
MOVING = {"optim": {"lr": 0.01}, "schedule": {"momentum": (0.5, 0.9), "warmup": 0.0}}
MIXTURE = [
    {"global_size": 24, "local_size": 16, "gram_size": 40},
    {"global_size": 32, "local_size": 16, "gram_size": 48},
]
FIRST = {"name": "first"}


def part(folder, name):
    (found,) = (folder.path / "phases").glob(f"*_{name}")
    return RunFolder(found)


def state(folder, step):
    """All tensors of a checkpoint, nested as the learner has them; moments by parameter."""
    path = folder.checkpoints / f"step_{step:08d}"
    tensors = checkpoint.blank(path, "", torch.device("cpu"))
    checkpoint.load(path, tensors, ALONE)
    return unflatten(tensors, {})


def same(ours, theirs):
    assert set(ours) == set(theirs)
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def trained(folder):
    return list(folder.path.rglob("metrics.jsonl"))


def test_four_phases_run_in_order_and_deliver_what_opens(tiny, tmp_path):
    recipe = tiny(
        steps=4,
        checkpoint={"snapshots": 1},
        phases=[
            {"name": "pretrain"},
            {
                "name": "anchored",
                "start": "state",
                "steps": 2,
                "gram": {"teacher": "pretrain@2", "size": 48, "refresh_every": 2},
            },
            {
                "name": "highres",
                "start": "teacher",
                "gram": {"teacher": "anchored", "weight": 1.5},
                "crops": {"mixture": MIXTURE},
            },
            {
                "name": "students",
                "distill": {"students": {"vit": VIT, "cnx": CNX}},
                "crops": {"global_size": 128, "local_size": 64},
            },
        ],
    )
    folder = RunFolder(tmp_path / "run")
    export = pretrain(recipe, folder, quiet=True)
    names = [path.name for path in sorted((folder.path / "phases").iterdir())]
    assert names == ["1_pretrain", "2_anchored", "3_highres", "4_students"]
    for name, steps, method, size in (
        ("pretrain", 4, "DINO + iBOT + KoLeo", 24),
        ("anchored", 2, "DINO + iBOT + KoLeo + Gram", 24),
        ("highres", 4, "DINO + iBOT + KoLeo + Gram", 32),
    ):
        ran = part(folder, name)
        assert [row["step"] for row in ran.rows()] == list(range(steps))
        assert all(("gram" in row) == ("Gram" in method) for row in ran.rows())
        info = load_backbone(ran.export).info
        assert (info.training["steps"], info.training["method"]) == (steps, method)
        assert info.size == size
    assert {path.name for path in export.iterdir()} == {"vit", "cnx"}
    for name, size, width in (("vit", 32, 16), ("cnx", 128, 16)):
        backbone = load_backbone(export / name)
        assert backbone(torch.zeros(1, 3, size, size)).cls.shape == (1, width)
        own = part(folder, "students").export / name / "model.safetensors"
        assert same(load_file(export / name / "model.safetensors"), load_file(own))


def test_state_goes_on_with_networks_and_moments_to_the_bit(tiny, tmp_path):
    told = {"name": "second", "start": "state", "steps": 1, "optim": {"betas": (0.8, 0.99)}}
    recipe = tiny(phases=[FIRST | {"steps": 3}, told], **MOVING)
    folder = RunFolder(tmp_path / "run")
    pretrain(recipe, folder, quiet=True)
    before = state(part(folder, "first"), 3)
    (_, plan) = recipe.plans()[1]

    # The same by hand: new networks, all tensors copied in, one step.
    run = assemble(plan, RunFolder(tmp_path / "hand"), resume=False)
    assert isinstance(run.learner, SelfDistillation)
    assert not same(run.learner.student.state_dict(), before["student"])
    run.learner.student.load_state_dict(before["student"])
    run.learner.teacher.load_state_dict(before["teacher"])
    parameters = dict(run.named_parameters())
    assert set(parameters) == set(before["optimizer"])
    for name, moments in before["optimizer"].items():
        run.optimizer.state[parameters[name]] = {k: v.clone() for k, v in moments.items()}
    ((step, images),) = run.batches()
    one_step(run, run.crops(step, images), Timetable(run.recipe).at(step))
    assert {tuple(group["betas"]) for group in run.optimizer.param_groups} == {(0.8, 0.99)}

    after = state(part(folder, "second"), 1)
    for name in ("student", "teacher"):
        assert same(after[name], run.learner.state()[name])
    for name, parameter in parameters.items():
        assert same(after["optimizer"][name], run.optimizer.state[parameter])
        assert after["optimizer"][name]["step"] == 4


def test_the_new_phase_decides_about_rates_and_not_the_one_before(tiny, tmp_path):
    told = {
        "name": "second",
        "start": "state",
        "optim": {"layer_decay": 0.5, "patch_embed_multiplier": 1.0},
    }
    recipe = tiny(phases=[FIRST, told], steps=1)
    folder = RunFolder(tmp_path / "run")
    pretrain(recipe, folder, quiet=True)
    (_, plan) = recipe.plans()[1]
    origin = Origin("state", {"first": part(folder, "first")})
    run = assemble(plan, RunFolder(tmp_path / "again"), resume=False, origin=origin)
    least = min(group["lr_multiplier"] for group in run.optimizer.param_groups)
    assert least == pytest.approx(0.5**3)
    assert all(float(run.optimizer.state[p]["step"]) == 1 for _, p in run.named_parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_teacher_becomes_student_and_teacher_with_a_fresh_optimiser(tiny, tmp_path, shared):
    folder = RunFolder(tmp_path / "first")
    pretrain(tiny(objective={"shared_head": shared}, **MOVING), folder, quiet=True)
    average = state(folder, 6)["teacher"]
    assert not same(average, state(folder, 6)["student"])
    origin = Origin("teacher", {"first": folder})
    recipe = tiny(objective={"shared_head": shared}, seed=3)
    run = assemble(recipe, RunFolder(tmp_path / "second"), resume=False, origin=origin)
    assert isinstance(run.learner, SelfDistillation)
    assert same(run.learner.student.state_dict(), average)
    assert same(run.learner.teacher.state_dict(), average)
    assert not run.optimizer.state
    assert all(p.requires_grad for p in run.learner.student.parameters())


def two_phases(tiny, workers=0, **others):
    gram = {"teacher": "ema", "copy_at": 1, "refresh_every": 3}
    return tiny(
        data={"workers": workers},
        model={"drop_path": 0.2},
        phases=[
            FIRST,
            {"name": "second", "start": "state", "gram": gram, "crops": {"mixture": MIXTURE}},
            {"name": "third", "start": "teacher", "steps": 2, "gram": {"teacher": "second"}},
        ],
        **MOVING,
        **others,
    )


def stopped(monkeypatch, recipe, folder, name, step):
    """Runs until a phase would note a step."""
    noted = RunFolder.note

    def note(self, row):
        if self.path.name.endswith(name) and row["step"] == step:
            raise KeyboardInterrupt
        noted(self, row)

    monkeypatch.setattr(RunFolder, "note", note)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder, quiet=True)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("workers", "name", "step"),
    [(0, "second", 0), (0, "second", 3), (2, "second", 5), (0, "third", 0)],
)
def test_resuming_inside_a_phase_repeats_the_uninterrupted_run_to_the_bit(
    tiny, tmp_path, monkeypatch, workers, name, step
):
    uninterrupted, folder = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    pretrain(two_phases(tiny), uninterrupted, quiet=True)
    recipe = two_phases(tiny, workers)
    stopped(monkeypatch, recipe, folder, name, step)
    assert not folder.export.exists()
    export = pretrain(recipe, folder, resume=True, quiet=True)
    assert same(
        load_file(export / "model.safetensors"),
        load_file(uninterrupted.export / "model.safetensors"),
    )
    for phase, steps in (("first", 6), ("second", 6), ("third", 2)):
        ours, theirs = (state(part(f, phase), steps) for f in (folder, uninterrupted))
        moments = ours.pop("optimizer"), theirs.pop("optimizer")
        for piece in set(theirs) - {"centers"}:
            assert same(ours[piece], theirs[piece]), (phase, piece)
        assert set(moments[0]) == set(moments[1])
        assert all(same(moments[0][name], moments[1][name]) for name in moments[1])
        assert [row["step"] for row in part(folder, phase).rows()] == list(range(steps))
    assert "gram" in state(part(folder, "second"), 6)


def test_resuming_between_phases_keeps_what_is_done(tiny, tmp_path, monkeypatch):
    recipe = two_phases(tiny)
    uninterrupted, folder = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    pretrain(recipe, uninterrupted, quiet=True)
    train, begun = phases.train, []

    def counted(plan, ran, **others):
        begun.append(ran.path.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return train(plan, ran, **others)

    monkeypatch.setattr(phases, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder, quiet=True)
    export = pretrain(recipe, folder, resume=True, quiet=True)
    assert begun == ["1_first", "2_second", "2_second", "3_third"]
    assert same(
        load_file(export / "model.safetensors"),
        load_file(uninterrupted.export / "model.safetensors"),
    )


def test_a_phase_is_done_when_every_student_is_delivered(tiny, tmp_path):
    told = {"students": {"a": VIT, "b": VIT}}
    recipe = tiny(phases=[FIRST, {"name": "second", "distill": told}], steps=1)
    folder = RunFolder(tmp_path / "run")
    export = pretrain(recipe, folder, quiet=True)
    held = load_file(export / "b" / "model.safetensors")
    # As if killed between the two exports.
    shutil.rmtree(part(folder, "second").export / "b")
    export = pretrain(recipe, folder, resume=True, quiet=True)
    assert same(load_file(export / "b" / "model.safetensors"), held)


def refused(tiny, tmp_path, sentence, *told, kind: type[DinoAdaptersError] = RecipeError, **others):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(kind, match=sentence) as caught:
        pretrain(tiny(phases=list(told), **others), folder, quiet=True)
    assert not trained(folder)
    assert not folder.holds_a_run
    assert tempfile.gettempdir() not in str(caught.value)
    assert "\n" not in str(caught.value)


def second(**told):
    return {"name": "second", **told}


@pytest.mark.parametrize("start", ["state", "teacher"])
def test_the_first_phase_has_nothing_to_start_from(tiny, tmp_path, start):
    sentence = f"Phase first: it starts from the {start} of the phase before, and there is none"
    refused(tiny, tmp_path, sentence, FIRST | {"start": start})


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("first kept no snapshot of step 1, only of", {"gram": {"teacher": "first@1"}}),
        ("first kept no snapshot of step x, only of", {"gram": {"teacher": "first@x"}}),
        (r"no network called 'frist'.* Earlier phases: first\.", {"gram": {"teacher": "frist"}}),
        (
            r"heads in first/export have 16 and 16 prototypes .* wants 8 and 8",
            {"distill": {"students": {"s": VIT}}, "objective": {"prototypes": 8}},
        ),
        (
            "crop size of the recipe is 28 px, and .* has patches of 8 px. Take multiples of 8 px.",
            {"crops": {"mixture": [MIXTURE[0], {"global_size": 28, "local_size": 16}]}},
        ),
        (
            "A crop of 24 px is no multiple of 32 px, the coarsest patch",
            {"distill": {"students": {"s": CNX}}, "crops": {"local_count": 0}},
        ),
        (
            "networks or heads are not those of the phase before",
            {"start": "state", "objective": {"hidden_dim": 8}},
        ),
        (
            "networks or heads are not those of the phase before",
            {"start": "state", "objective": {"prototypes": 8}},
        ),
        (
            r"prototypes .* wants 8 and 8",
            {"start": "teacher", "objective": {"prototypes": 8}},
        ),
        (
            "heads in first/export are built otherwise",
            {"start": "teacher", "objective": {"hidden_dim": 8}},
        ),
        (
            "heads in first/export are built otherwise",
            {"start": "teacher", "objective": {"shared_head": True}},
        ),
    ],
)
def test_phases_that_do_not_fit_are_refused_before_the_first_step(tiny, tmp_path, sentence, told):
    refused(tiny, tmp_path, f"Phase second: .*{sentence}", FIRST, second(**told))


def test_several_students_are_no_start(tiny, tmp_path):
    students = {"a": VIT, "b": VIT}
    told = (FIRST, second(distill={"students": students}), {"name": "third", "start": "teacher"})
    refused(tiny, tmp_path, "Phase third: the phase before made 2 students", *told)


def test_a_gram_teacher_of_another_width_is_refused_with_its_phase(tiny, tmp_path):
    wide = {"name": "first", "model": {"architecture": {"embed_dim": 32, "num_heads": 2}}}
    sentence = "Phase second: The Gram teacher first has width 32, .* the student width 24, "
    refused(tiny, tmp_path, sentence, wide, second(start="fresh", gram={"teacher": "first"}))


def test_a_phase_starts_from_the_teacher_before_unless_told_otherwise(tiny):
    told = tiny(
        phases=[
            FIRST,
            second(),
            {"name": "third", "start": "fresh"},
            {"name": "fourth", "start": "state"},
            {"name": "fifth", "distill": {"students": {"s": VIT}}},
        ]
    )
    starts = [phase.start for phase, _ in told.plans()]
    assert starts == ["fresh", "teacher", "fresh", "state", "fresh"]
    again = PretrainRecipe.model_validate(told.model_dump(mode="json"))
    assert [phase.start for phase, _ in again.plans()] == starts


def test_a_gram_teacher_of_another_normalisation_is_refused(tiny, tmp_path):
    export = pretrain(tiny(steps=1), RunFolder(tmp_path / "a"), quiet=True)
    card = json.loads((export / "card.json").read_text())
    card["info"]["mean"] = [0.1, 0.1, 0.1]
    (export / "card.json").write_text(json.dumps(card))
    plan = tiny(gram={"teacher": str(export)})
    with pytest.raises(RecipeError, match=r"trained with mean \(0\.1, 0\.1, 0\.1\) and std"):
        assemble(plan, RunFolder(tmp_path / "b"), resume=False)


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("gram.teacher", {"gram": {"teacher": "vitmicro8"}}),
        ("distill.teacher", {"distill": {"teacher": "vits16", "students": {"s": VIT}}}),
    ],
)
def test_a_teacher_of_random_weights_is_refused(tiny, tmp_path, setting, changes):
    with pytest.raises(RecipeError, match=f"{setting} is .*, an architecture with random weights"):
        assemble(tiny(**changes), RunFolder(tmp_path / "a"), resume=False)


def test_a_teacher_that_was_left_open_is_asked_for(tiny, tmp_path):
    told = {"teacher": "give distill.teacher=EXPORT", "students": {"s": VIT}}
    with pytest.raises(RecipeError, match="No teacher was named: add distill"):
        assemble(tiny(distill=told), RunFolder(tmp_path / "a"), resume=False)


def test_one_of_several_students_teaches_on(tiny, tmp_path):
    two = second(distill={"students": {"a": VIT, "b": VIT}})
    third = {"name": "third", "distill": {"teacher": "second/b", "students": {"c": VIT}}}
    folder = RunFolder(tmp_path / "run")
    pretrain(tiny(steps=1, phases=[FIRST, two, third]), folder, quiet=True)
    taught = load_backbone(folder.export).info.training["teacher"]
    assert taught["training"]["teacher"]["name"] == "vitmicro8"
    del third["distill"]["teacher"]
    sentence = r"Phase third: The phase second made 2 students\. Name one: second/a or second/b"
    with pytest.raises(RecipeError, match=sentence):
        pretrain(tiny(phases=[FIRST, two, third]), RunFolder(tmp_path / "b"), quiet=True)


@pytest.mark.parametrize("own", ["none", "apache-2.0"])
def test_a_licence_goes_from_teacher_to_student(tiny, tmp_path, own):
    exports = {}
    for licence in (DINOV3_LICENCE_ID, own):
        export = pretrain(tiny(steps=1), RunFolder(tmp_path / licence), quiet=True)
        card = json.loads((export / "card.json").read_text())
        card["info"]["licence"] = licence
        (export / "card.json").write_text(json.dumps(card))
        exports[licence] = str(export)
    students = {"s": {"source": exports[own]}}
    told = tiny(steps=1, distill={"teacher": exports[DINOV3_LICENCE_ID], "students": students})
    student = pretrain(told, RunFolder(tmp_path / "b"), quiet=True)
    info = load_backbone(student).info
    assert info.licence == info.training["teacher"]["licence"] == DINOV3_LICENCE_ID
    assert (student / LICENCE_FILE).is_file()


def test_words_that_every_phase_overrules_are_named(tiny, tmp_path, caplog):
    recipe = tiny(phases=[FIRST | {"steps": 1, "optim": {"lr": 0.01}}])
    words = ("steps=4", "optim.lr=0.1", "optim.clip=1.0", "seed=3", "gram=null")
    pretrain(recipe, RunFolder(tmp_path / "a"), overrides=words, quiet=True)
    named = [line for line in caplog.messages if "changes nothing" in line]
    assert len(named) == 2
    assert named[0].startswith("steps=4 changes nothing")
    assert named[1].endswith("Write phases.first.optim.lr=0.1.")


def test_resuming_an_empty_folder_is_said_for_phases_too(tiny, tmp_path, caplog):
    pretrain(tiny(phases=[FIRST], steps=1), RunFolder(tmp_path / "a"), resume=True, quiet=True)
    assert caplog.text.count("holds no run to resume") == 1


def test_the_gram_term_begins_when_its_teacher_is_copied(tiny, tmp_path):
    folder = RunFolder(tmp_path / "a")
    pretrain(tiny(gram={"teacher": "ema", "copy_at": 2, "ramp": 0.5}), folder, quiet=True)
    assert ["gram" in row for row in folder.rows()] == [False] * 3 + [True] * 3
    weights = [
        Timetable(tiny(gram={"copy_at": 2, "ramp": 0.5})).at(n).gram_weight for n in range(6)
    ]
    assert weights[:3] == [0.0, 0.0, 0.0]
    assert weights[3:] == pytest.approx([0.5, 1.5, 2.0])


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        (r"gram and distill are both given", [second(gram={}, distill={"students": {"s": VIT}})]),
        (r"The phases are called first, first\. Give each its own name", [FIRST]),
        (
            r"no setting 'phases\.second\.optim\.lrr'\. Did you mean 'phases\.second\.optim\.lr'\?",
            [second(optim={"lrr": 1.0})],
        ),
        (
            r"'phases\.second\.gram\.teachr'\. Did you mean 'phases\.second\.gram\.teacher'\?",
            [second(gram={"teachr": "x"})],
        ),
        (r"no setting 'phases\.1\.optm'\. Did you mean 'optim'\?", [second(optm={"lr": 1.0})]),
    ],
)
def test_recipes_of_phases_are_checked_when_they_are_read(tmp_path, sentence, told):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"data": {"source": "x"}, "phases": [FIRST, *told]}))
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(file, PretrainRecipe, [])


def test_a_phase_turns_the_gram_term_of_the_recipe_off(tiny, tmp_path):
    gram = {"teacher": "ema", "weight": 3.0}
    told = tiny(gram=gram, phases=[FIRST, second(gram=None), {"name": "third", "gram": {}}])
    weights = [plan.gram and plan.gram.weight for _, plan in told.plans()]
    assert weights == [3.0, None, 3.0]
    students = {"students": {"s": VIT}}
    told = tiny(gram=gram, steps=1, phases=[FIRST, second(gram=None, distill=students)])
    folder = RunFolder(tmp_path / "run")
    pretrain(told, folder, quiet=True)
    assert "gram" in part(folder, "first").rows()[0]


def test_a_network_that_only_a_distillation_could_read_is_refused(tiny, tmp_path):
    sentence = r"model is given \(vitmicro8\), and a distillation reads distill.students"
    distill = {"students": {"s": VIT}}
    refused(tiny, tmp_path, sentence, second(distill=distill))
    refused(tiny, tmp_path, sentence, model=tiny().model.model_dump(), distill=distill)


def test_how_states_are_kept_may_change_inside_a_phase(tiny, tmp_path):
    def recipe(**checkpoint):
        return tiny(phases=[FIRST | {"checkpoint": checkpoint}], steps=2)

    folder = RunFolder(tmp_path / "run")
    pretrain(recipe(every_steps=3), folder, quiet=True)
    pretrain(recipe(every_steps=4, keep=1), folder, resume=True, quiet=True)
    with pytest.raises(CheckpointError, match=r"phases\.0\.checkpoint\.snapshots: None -> 1"):
        pretrain(recipe(every_steps=4, snapshots=1), folder, resume=True, quiet=True)


def test_accepted_changes_do_not_reach_what_is_done_and_that_is_said(tiny, tmp_path, caplog):
    folder, recipe = RunFolder(tmp_path / "run"), tiny(phases=[FIRST], steps=2)
    export = pretrain(recipe, folder, quiet=True)
    before = load_file(export / "model.safetensors")
    changed = tiny(phases=[FIRST], steps=2, optim={"lr": 0.5})
    pretrain(changed, folder, resume=True, accept_changes=True, quiet=True)
    assert "Changed settings do not reach what is done: first." in caplog.text
    assert same(load_file(export / "model.safetensors"), before)


@pytest.mark.parametrize("kind", ["teacher", "distill"])
def test_centres_of_the_targets_travel_with_the_heads(tiny, tmp_path, kind):
    objective = {"centering": "softmax"}
    folder = RunFolder(tmp_path / "first")
    export = pretrain(tiny(objective=objective, steps=2), folder, quiet=True)
    kept = state(folder, 2)["centers"]
    assert set(kept) == {"dino", "ibot"}
    if kind == "teacher":
        origin, more = Origin("teacher", {"first": folder}), {}
    else:
        origin, more = FRESH, {"distill": {"teacher": str(export), "students": {"s": VIT}}}
    for wanted, centering in ((kept, "softmax"), ({}, "sinkhorn")):
        plan = tiny(objective={"centering": centering}, **more)
        run = assemble(plan, RunFolder(tmp_path / centering), resume=False, origin=origin)
        assert isinstance(run.learner, SelfDistillation | Distillation)
        assert same(run.learner.balance.centers, wanted)


@pytest.mark.parametrize("shared", [True, False])
def test_a_teacher_without_ibot_cannot_teach_it(tiny, tmp_path, shared):
    objective = {"shared_head": shared, "ibot_weight": 0.0}
    export = pretrain(tiny(objective=objective, steps=1), RunFolder(tmp_path / "a"), quiet=True)
    distill = {"teacher": str(export), "students": {"s": VIT}}
    plan = tiny(objective={"shared_head": shared}, distill=distill)
    with pytest.raises(RecipeError, match=r"trained without iBOT.* Set objective.ibot_weight=0"):
        assemble(plan, RunFolder(tmp_path / "b"), resume=False)
    assemble(tiny(objective=objective, distill=distill), RunFolder(tmp_path / "b"), resume=False)


@pytest.mark.parametrize(
    ("sentence", "spoil"),
    [
        (
            "card in .* does not tell how the heads",
            lambda card: card["info"]["training"].pop("recipe"),
        ),
        (
            "card in .* does not tell how the heads",
            lambda card: card["info"]["training"]["recipe"]["objective"].update(hidden=3),
        ),
        (
            r"heads in .* cannot be read, or are not those of its card \(RuntimeError\)",
            lambda card: card["info"]["training"]["recipe"]["objective"].update(hidden_dim=3),
        ),
    ],
)
def test_heads_of_another_maker_are_refused_with_a_sentence(tiny, tmp_path, sentence, spoil):
    export = pretrain(tiny(steps=1), RunFolder(tmp_path / "a"), quiet=True)
    card = json.loads((export / "card.json").read_text())
    spoil(card)
    (export / "card.json").write_text(json.dumps(card))
    plan = tiny(distill={"teacher": str(export), "students": {"s": VIT}})
    with pytest.raises(WeightsError, match=sentence):
        assemble(plan, RunFolder(tmp_path / "b"), resume=False)


@pytest.mark.parametrize(("first", "said"), [(5, "after 8 steps, and there are 6"), (3, "")])
def test_a_refresh_that_is_never_due_is_said(tiny, tmp_path, caplog, first, said):
    plan = tiny(gram={"refresh_every": 4, "first_refresh": first})
    assemble(plan, RunFolder(tmp_path / "a"), resume=False)
    assert ("never refreshed" in caplog.text) == bool(said)
    assert said in caplog.text


def test_replaced_statistics_of_trained_weights_are_said(tiny, tmp_path):
    export = pretrain(tiny(steps=1), RunFolder(tmp_path / "a"), quiet=True)
    for mean, said in (((0.485, 0.456, 0.406), False), ((0.1, 0.456, 0.406), True)):
        notices = Notices()
        build_network(export, mean=mean, notices=notices)
        assert any("Mean and std" in line for line in notices.summary()) == said


def test_a_run_folder_in_place_of_its_export_is_put_right(tiny, tmp_path):
    export = pretrain(tiny(steps=1), RunFolder(tmp_path / "a"), quiet=True)
    with pytest.raises(WeightsError, match=r"Did you mean .*a/export\?"):
        load_backbone(export.parent)

"""Distillation: the teacher stands still, students see all patches and do not meet each other."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dino_adapters.backbones import build_network, export_backbone, load_backbone
from dino_adapters.contracts import RecipeError, ShapeError
from dino_adapters.pretrain import pretrain
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.distill import (
    Distillation,
    check_grids,
    crop_sizes,
    resized,
)
from dino_adapters.pretrain.imitate import FeatureDistillation
from dino_adapters.pretrain.masks import block_masks
from dino_adapters.pretrain.objective import make_networks
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.runtime.runfolder import RunFolder

TEACHER = {"embed_dim": 32, "num_heads": 2, "depth": 2, "rope_rescale": None, "layerscale": 1.0}
SMALL = TEACHER | {"embed_dim": 16, "depth": 1}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
OBJECTIVE = ObjectiveRecipe(prototypes=12, hidden_dim=16, bottleneck_dim=8, prototype_norm=1.0)
IMAGES = 3
CPU = torch.device("cpu")
VIT = {"source": "vitmicro8", "architecture": {"embed_dim": 16, "num_heads": 2, "depth": 1}}
CNX = {"source": "convnext_tiny", "architecture": CONVNEXT}


def knobs(**others):
    return Knobs(0, 1e-3, 1e-3, 0.04, 0.9, 0.05, **others)


def student(seed=1, **changes):
    return build_network("vitmicro8", architecture=SMALL | changes, seed=seed)[0]


def convnext():
    return build_network("convnext_tiny", architecture=CONVNEXT, seed=3)[0]


def teacher():
    network = build_network("vitmicro8", architecture=TEACHER, seed=0)[0]
    return make_networks(network, OBJECTIVE, seed=9)


def distillation(bf16=False, **students):
    return Distillation(teacher(), students, OBJECTIVE, seed=0, device=CPU, bf16=bf16)


def crops(size=32, local=16, grid=4):
    draws = torch.Generator().manual_seed(2)
    return Crops(
        torch.randn(2 * IMAGES, 3, size, size, generator=draws),
        torch.randn(2 * IMAGES, 3, local, local, generator=draws),
        block_masks(2 * IMAGES, (grid, grid), random.Random(0)),
        IMAGES,
    )


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(ours, theirs):
    assert set(ours) == set(theirs)
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def gradients(networks):
    return {n: p.grad.clone() for n, p in networks.named_parameters() if p.grad is not None}


def test_the_student_sees_every_patch():
    made, given = distillation(s=student()), crops()
    assert given.masks is not None
    assert given.masks.any()
    seen = made.step(given, knobs()).students["s"]
    open_eyed = made.students["s"]["backbone"](given.global_crops)
    torch.testing.assert_close(seen.patches, open_eyed.patches)
    torch.testing.assert_close(seen.cls.flatten(0, 1), open_eyed.cls)
    assert seen.ibot is not None
    wanted = made.students["s"]["ibot_head"](open_eyed.patches[given.masks])
    torch.testing.assert_close(seen.ibot, wanted)


def test_the_teacher_never_changes_and_the_average_follows_the_student():
    made, given = distillation(s=student()), crops()
    before, average = copied(made.teacher), copied(made.averages["s"])
    optimizer = torch.optim.AdamW(made.students["s"].parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(made.losses(given, knobs()))
        losses[-1].total.backward()
        optimizer.step()
        made.after(knobs())
        for name, parameter in made.students["s"].named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * parameter.detach()
    assert same(made.teacher.state_dict(), before)
    assert all(p.grad is None for p in made.teacher.parameters())
    assert losses[-1].total < losses[0].total
    for name, parameter in made.averages["s"].named_parameters():
        torch.testing.assert_close(parameter, average[name])


def test_two_students_learn_as_each_would_alone_from_one_forward_of_the_teacher():
    made, given, calls = distillation(a=student(1), b=student(2, depth=2)), crops(), []
    made.teacher["backbone"].register_forward_hook(lambda *_: calls.append(1))
    both = made.losses(given, knobs())
    both.total.backward()
    assert len(calls) == 1
    total = 0.0
    for name, network in {"a": student(1), "b": student(2, depth=2)}.items():
        alone = distillation(**{name: network})
        losses = alone.losses(given, knobs())
        losses.total.backward()
        total += losses.total.item()
        assert set(losses.terms) == {n for n in both.terms if n.startswith(f"{name}/")}
        assert all(torch.equal(both.terms[n], value) for n, value in losses.terms.items())
        assert same(gradients(made.students[name]), gradients(alone.students[name]))
    assert both.total.item() == pytest.approx(total)


def test_students_of_other_patch_size_get_crops_of_the_same_grid():
    made, given = distillation(vit=student(), cnx=convnext()), crops(128, 64, grid=4)
    sizes = crop_sizes(given, made.teacher, made.students)
    assert sizes == {"": (32, 16), "vit": (32, 16), "cnx": (128, 64)}
    lesson = made.step(given, knobs())
    assert {seen.grid for seen in lesson.students.values()} == {lesson.teacher.grid} == {(4, 4)}
    reduced = F.interpolate(given.global_crops, size=32, mode="bicubic", antialias=True)
    with torch.no_grad():
        wanted = made.teacher["backbone"](reduced).patches
    torch.testing.assert_close(lesson.teacher.patches, wanted)
    own = made.students["cnx"]["backbone"](given.global_crops)
    torch.testing.assert_close(lesson.students["cnx"].patches, own.patches)
    lesson.losses.total.backward()
    assert {name.split("/")[0] for name in lesson.losses.terms} == {"vit", "cnx"}
    assert resized(reduced, 32) is reduced


def test_other_grids_are_not_compared():
    check_grids("s", (4, 4), (4, 4))
    with pytest.raises(RecipeError, match="student s makes 3 x 4 patches and the teacher 4 x 4"):
        check_grids("s", (3, 4), (4, 4))


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_the_state_is_restored(centering):
    objective = OBJECTIVE.model_copy(update={"centering": centering})
    first, second = (
        Distillation(teacher(), {"s": student(i)}, objective, seed=i, device=CPU, bf16=False)
        for i in (1, 2)
    )
    first.losses(crops(), knobs())
    first.after(knobs())
    second.load_state(first.state())
    assert torch.equal(*(made.losses(crops(), knobs()).total for made in (first, second)))
    assert bool(first.balance.centers) == (centering == "softmax")


def test_bf16_stays_near_fp32():
    exact = distillation(s=student()).losses(crops(), knobs()).numbers()
    found = distillation(bf16=True, s=student()).losses(crops(), knobs()).numbers()
    for name, value in found.items():
        assert value == pytest.approx(exact[name], rel=0.05, abs=0.05), name


def features(seed=0):
    network = build_network("vitmicro8", architecture=TEACHER, seed=0)[0]
    students = {"s": student(seed)}
    return FeatureDistillation(network, students, seed=seed, device=CPU, bf16=False)


def test_features_are_standardised_by_channel_and_compared_by_cosine():
    made, given = features(), crops()
    with torch.no_grad():
        taught = made.teacher["backbone"](given.global_crops)
    found = made.losses(given, knobs()).terms
    networks = made.students["s"]
    seen = networks["backbone"](given.global_crops)
    for part in ("cls", "patches"):
        theirs = getattr(taught, part)
        flat = theirs.flatten(0, -2)
        theirs = (theirs - flat.mean(dim=0)) / flat.var(dim=0, unbiased=False).sqrt()
        ours = networks["cls_map" if part == "cls" else "patch_map"](getattr(seen, part))
        gap = 1 - (F.normalize(ours, dim=-1) * F.normalize(theirs, dim=-1)).sum(dim=-1)
        torch.testing.assert_close(found[f"s/{part}"], gap.mean(), rtol=1e-3, atol=1e-3)


def test_the_statistics_of_features_are_restored():
    first, second = features(1), features(2)
    for _ in range(3):
        first.losses(crops(), knobs())
    second.load_state(first.state())
    assert torch.equal(*(made.losses(crops(), knobs()).total for made in (first, second)))


@pytest.fixture
def taught(tiny, tmp_path):
    """The export of a short run, heads included."""
    return str(pretrain(tiny(steps=2), RunFolder(tmp_path / "teacher"), quiet=True))


def weights(export):
    return load_file(export / "model.safetensors")


def stop_at(monkeypatch, step):
    noted = RunFolder.note

    def note(self, row):
        if row["step"] == step:
            raise KeyboardInterrupt
        noted(self, row)

    monkeypatch.setattr(RunFolder, "note", note)


def test_students_of_one_run_are_those_of_runs_of_their_own(tiny, tmp_path, taught):
    deeper = {"source": "vitmicro8", "architecture": {"embed_dim": 24, "num_heads": 2, "depth": 2}}
    students = {"a": VIT, "b": deeper}

    def run(name, **which):
        recipe = tiny(distill={"teacher": taught, "students": which}, optim={"clip": 0.5}, steps=3)
        folder = RunFolder(tmp_path / name)
        return pretrain(recipe, folder, quiet=True), folder.rows()

    export, rows = run("both", **students)
    assert {p.name for p in export.iterdir()} == {"a", "b"}
    for name, told in students.items():
        own, own_rows = run(name, **{name: told})
        assert same(weights(export / name), weights(own))
        for ours, theirs in zip(rows, own_rows, strict=True):
            shared = {k for k in theirs if k.startswith(f"{name}/")}
            assert shared
            assert all(ours[k] == theirs[k] for k in shared)
        card = load_backbone(own).info
        assert card.training["method"] == "distillation: DINO + iBOT + KoLeo"


def test_a_run_with_two_kinds_of_students_resumes_to_the_bit(tiny, tmp_path, taught, monkeypatch):
    recipe = tiny(
        distill={"teacher": taught, "students": {"vit": VIT | {"drop_path": 0.2}, "cnx": CNX}},
        crops={"global_size": 128, "local_size": 64},
        steps=4,
    )
    whole = pretrain(recipe, RunFolder(tmp_path / "a"), quiet=True)
    folder = RunFolder(tmp_path / "b")
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder, quiet=True)
    monkeypatch.undo()
    again = pretrain(recipe, folder, resume=True, quiet=True)
    for name, patch, size in (("vit", 8, 32), ("cnx", 32, 128)):
        assert same(weights(again / name), weights(whole / name))
        info = load_backbone(again / name).info
        assert (info.patch_size, info.size) == (patch, size)


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A network of timm that says it was trained."""
    network, info = build_network("resnet10t", seed=1)
    told = replace(info, training={"weights": "made for a test"})
    return str(export_backbone(network, told, tmp_path_factory.mktemp("timm") / "export"))


def test_features_of_a_network_without_heads_are_learnt_and_resumed(
    tiny, tmp_path, monkeypatch, headless
):
    recipe = tiny(
        distill={"teacher": headless, "students": {"s": VIT}},
        crops={"global_size": 64, "local_size": 32, "local_count": 0},
        optim={"lr": 3e-3, "batch_size": 8},
        steps=10,
    )
    first = RunFolder(tmp_path / "a")
    whole = pretrain(recipe, first, quiet=True)
    rows = first.rows()
    assert {"s/cls", "s/patches"} <= set(rows[0])
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert load_backbone(whole).info.training["method"] == "feature distillation"
    assert not (whole / "heads.safetensors").exists()
    folder = RunFolder(tmp_path / "b")
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder, quiet=True)
    monkeypatch.undo()
    assert same(weights(pretrain(recipe, folder, resume=True, quiet=True)), weights(whole))


HEADLESS = {"teacher": "HEADLESS", "students": {"s": VIT}}
LARGE = {"global_size": 64, "local_size": 32}


@pytest.mark.parametrize(
    ("error", "sentence", "changes"),
    [
        (
            RecipeError,
            "a distillation without a teacher. Set distill.teacher",
            {"distill": {"students": {"s": VIT}}},
        ),
        (
            RecipeError,
            "distill.by is heads, and resnet10t comes without any",
            {"distill": HEADLESS | {"by": "heads"}, "crops": LARGE},
        ),
        (
            RecipeError,
            r"features of resnet10t are imitated.* Set crops.local_count=0",
            {"distill": HEADLESS, "crops": LARGE},
        ),
        (
            ShapeError,
            "A crop of 16 px is no multiple of 32 px, the coarsest patch",
            {
                "distill": {"teacher": "TAUGHT", "students": {"s": CNX}},
                "crops": {"global_size": 64, "local_size": 16},
            },
        ),
        (
            RecipeError,
            r"have 16 and 16 prototypes \(DINO, iBOT\) and the recipe wants 8 and 8",
            {
                "distill": {"teacher": "TAUGHT", "students": {"s": VIT}},
                "objective": {"prototypes": 8},
            },
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    tiny, tmp_path, taught, headless, error, sentence, changes
):
    told = dict(changes)
    exports = {"TAUGHT": taught, "HEADLESS": headless}
    if (word := told["distill"].get("teacher")) in exports:
        told["distill"] = told["distill"] | {"teacher": exports[word]}
    with pytest.raises(error, match=sentence):
        pretrain(tiny(**told), RunFolder(tmp_path / "run"), quiet=True)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize("name", ["", "../elsewhere", "a b"])
def test_names_of_students_are_names_of_folders(tiny, name):
    with pytest.raises(ValueError, match="pattern"):
        tiny(distill={"teacher": "resnet10t", "students": {name: VIT}})

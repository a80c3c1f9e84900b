"""Options of the objective: each changes the terms or heads that it names, and resumes."""

import random

import pytest
import torch

from dino_adapters.backbones import build_network
from dino_adapters.pretrain import pretrain
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.masks import block_masks
from dino_adapters.pretrain.objective import Balance, learn
from dino_adapters.pretrain.optim import Knobs, Timetable
from dino_adapters.pretrain.prototypes import GAIN, ProjectionHead
from dino_adapters.pretrain.regularizers import sigreg_loss
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.recipes.teachers import GramRecipe
from dino_adapters.runtime.runfolder import RunFolder

SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 1, "rope_rescale": None, "layerscale": 1.0}
HEADS = {"prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8, "prototype_norm": 1.0}
ALL = {"dino_global", "dino_local", "ibot"}


def knobs(**others):
    return Knobs(0, 1e-3, 1e-3, 0.04, 0.9, 0.05, **others)


def learner(*, gram=None, bf16=False, **objective):
    network, _ = build_network("vitmicro8", architecture=SMALL, seed=1)
    recipe = ObjectiveRecipe.model_validate(HEADS | objective)
    device = torch.device("cpu")
    return SelfDistillation(network, recipe, seed=0, device=device, bf16=bf16, gram=gram)


def crops(images=3):
    draws = torch.Generator().manual_seed(2)
    return Crops(
        torch.randn(2 * images, 3, 32, 32, generator=draws),
        torch.randn(2 * images, 3, 16, 16, generator=draws),
        block_masks(2 * images, (4, 4), random.Random(0)),
        images,
    )


def step(made, given, **others):
    """One step of AdamW; the losses before it."""
    optimizer = torch.optim.AdamW(made.student.parameters(), lr=1e-3)
    losses = made.losses(given, knobs(**others))
    losses.total.backward()
    optimizer.step()
    made.after(knobs(**others))
    return losses


@pytest.mark.parametrize("regularizer", ["koleo", "kde", "sigreg", "none"])
def test_each_regularizer_trains_under_its_own_name(regularizer):
    made, given = learner(regularizer=regularizer), crops(images=4)
    losses = step(made, given, regularizer_weight=0.3)
    assert set(losses.terms) == ALL | ({regularizer} - {"none"})
    if regularizer != "none":
        fresh = learner(regularizer=regularizer)
        off = fresh.losses(given, knobs(regularizer_weight=0.0)).total
        # Summed over the two global crops, and noted as their mean.
        value = losses.terms[regularizer]
        torch.testing.assert_close(losses.total, off + 2 * 0.3 * value)
        (gradient,) = torch.autograd.grad(
            fresh.losses(given, knobs()).terms[regularizer],
            fresh.student["backbone"].get_parameter("cls_token"),
        )
        assert gradient.norm() > 0.1
    after = made.losses(given, knobs()).total
    assert after.isfinite()
    assert after != losses.total


def test_one_head_can_serve_both_terms():
    made, given = learner(shared_head=True), crops()
    assert set(made.student) == {"backbone", "dino_head"}
    head = made.student["dino_head"].get_parameter("last_layer.weight")
    for term in ("dino_global", "ibot"):
        (gradient,) = torch.autograd.grad(made.losses(given, knobs()).terms[term], head)
        assert gradient.abs().sum() > 0
    found = made.step(given, knobs())
    assert given.masks is not None
    assert found.student.ibot is not None
    wanted = made.student["dino_head"](found.student.patches[given.masks])
    torch.testing.assert_close(found.student.ibot, wanted)


def test_softmax_centering_follows_its_formula():
    draws = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 4, generator=draws) for _ in range(2))
    balance = Balance(ObjectiveRecipe(centering="softmax", center_momentum=0.7))
    torch.testing.assert_close(balance("dino", first, 0.1), (first / 0.1).softmax(dim=-1))
    assert not balance.centers  # a step that is refused leaves them alone
    balance.move()
    center = 0.3 * first.mean(dim=0, keepdim=True)
    torch.testing.assert_close(
        balance("dino", second, 0.1), ((second - center) / 0.1).softmax(dim=-1)
    )
    balance.move()
    center = 0.7 * center + 0.3 * second.mean(dim=0, keepdim=True)
    torch.testing.assert_close(balance.centers["dino"], center)
    assert set(balance.centers) == {"dino"}


def test_centres_are_kept_with_the_state():
    made, other = learner(centering="softmax"), learner(centering="softmax")
    step(made, crops())
    assert set(made.balance.centers) == {"dino", "ibot"}
    other.load_state(made.state())
    for name, center in made.balance.centers.items():
        assert torch.equal(other.balance.centers[name], center)
    again = made.losses(crops(), knobs()).total
    assert torch.equal(other.losses(crops(), knobs()).total, again)


def test_a_run_with_centres_and_norms_of_weights_resumes_to_the_bit(
    tiny, tmp_path, monkeypatch, state_of
):
    recipe = tiny(objective={"centering": "softmax", "weight_norm": "free", "shared_head": True})
    whole = RunFolder(tmp_path / "a")
    pretrain(recipe, whole, quiet=True)
    folder, noted = RunFolder(tmp_path / "b"), RunFolder.note

    def stop(self, row):
        if row["step"] == 4:
            raise KeyboardInterrupt
        noted(self, row)

    monkeypatch.setattr(RunFolder, "note", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder, quiet=True)
    monkeypatch.undo()
    pretrain(recipe, folder, resume=True, quiet=True)
    ours, theirs = (state_of(f.checkpoints / "step_00000006") for f in (folder, whole))
    assert set(theirs["centers"]) == {"dino", "ibot"}
    for part in ("student", "teacher", "centers"):
        for name, tensor in theirs[part].items():
            assert torch.equal(ours[part][name], tensor), name


@pytest.mark.parametrize(("kind", "trained"), [("free", True), ("fixed", False)])
def test_gains_of_prototypes_are_trained_or_fixed(kind, trained):
    made = learner(weight_norm=kind)
    gain = made.student["dino_head"].get_parameter(f"last_layer.{GAIN}")
    before = gain.clone()
    assert torch.equal(before, torch.ones_like(before))
    step(made, crops())
    assert torch.equal(gain, before) != trained
    assert made.losses(crops(), knobs()).total.isfinite()


def test_the_local_weight_scales_the_local_share_without_renormalising():
    made, given = learner(), crops()
    full, half = (made.losses(given, knobs(local_weight=w)) for w in (1.0, 0.5))
    # Pairs: 2 among the global crops, 2 * 2 of local with global.
    torch.testing.assert_close(full.total - half.total, 0.5 * 4 / 6 * full.terms["dino_local"])


def test_the_local_weight_moves_in_half_a_cosine(tiny):
    recipe = tiny(steps=20, objective={"local_weight": (1.0, 0.5)}, schedule={"local_ramp": 0.5})
    told = [Timetable(recipe).at(step).local_weight for step in range(20)]
    assert told[0] == 1.0
    assert told[5] == pytest.approx(0.75)
    assert told[10:] == [0.5] * 10
    assert told[:11] == sorted(told[:11], reverse=True)


def test_sigreg_would_do_nothing_on_the_bottleneck_of_a_small_head():
    """Why it looks at class tokens: values near 0 have next to no gradient."""
    fresh = learner()
    cls = learn(fresh.student, crops(4), hide=True).cls[0]
    head = fresh.student["dino_head"]
    assert isinstance(head, ProjectionHead)
    bottleneck = head.trunk(cls)
    token = fresh.student["backbone"].get_parameter("cls_token")
    there, here = (
        torch.autograd.grad(sigreg_loss(x, step=0), token, retain_graph=True)[0].norm()
        for x in (bottleneck, cls)
    )
    assert there < 1e-4 * here


@pytest.mark.parametrize("regularizer", ["kde", "sigreg"])
def test_bf16_stays_near_fp32(regularizer):
    gram = GramRecipe()
    options = {"regularizer": regularizer, "centering": "softmax", "weight_norm": "free"}
    exact = learner(gram=gram, **options).losses(crops(4), knobs(gram_weight=1.0)).numbers()
    rounded = learner(gram=gram, bf16=True, **options)
    found = rounded.losses(crops(4), knobs(gram_weight=1.0))
    assert found.total.dtype == torch.float32
    assert set(exact) == {"loss", "gram", regularizer} | ALL
    for name, value in found.numbers().items():
        assert value == pytest.approx(exact[name], rel=0.05, abs=0.05), name

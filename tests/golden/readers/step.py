"""Kind `step`: one forward and backward pass of the whole objective, also in distillation."""

from typing import cast

import torch

from dino_adapters.backbones import VisionTransformer
from dino_adapters.pretrain.gram import gram_loss
from dino_adapters.pretrain.learner import Step
from dino_adapters.pretrain.objective import Learning, Losses, Teaching
from dino_adapters.pretrain.optim import Knobs, clip

from ..case import Case
from ..official_run import (
    crops_of,
    distillation,
    official_names,
    self_distillation,
    skip_surroundings,
)
from ..replay import ReplayedDraws
from ..tables import block_table

KOLEO_AT_START = 2e-2
"""In `step_init` all class tokens are almost equal: the official float64 run is 1e-2 away."""
ROPE_OUT, ROPE_GRAD = 1e-5, 2e-4
"""What bf16 tables allow when the order of rounding is kept; the case's own bound hides errors."""


def read(case: Case) -> None:
    case.settings.skip(
        "values_fp32",
        "grad_norms_fp32",
        "values_float64",
        "model_class",
        because="the same numbers stand in the tensors",
    )
    config = case.settings["config"]
    skip_surroundings(case)
    config.skip("teacher", "optim", because="no optimiser in this case")
    if case.name == "step_rope_bf16" and case.dtype == torch.float32:
        case.bounds = {"out": ROPE_OUT, "grad": ROPE_GRAD}
    frozen = config["distillation"]["enabled"]
    knobs, draws = _knobs(case), case.settings["draws"]
    crops = crops_of(case, "in/")
    masks = crops.masks
    assert masks is not None
    assert not case.settings["parameters_without_gradient"]
    if frozen:
        learner = distillation(case)
        lesson = learner.step(crops, knobs)
        losses, teacher, student = lesson.losses, lesson.teacher, lesson.students["student"]
        networks, gram, prefix = learner.students["student"], None, "student/"
    else:
        learner = self_distillation(case)
        backbone = cast(VisionTransformer, learner.student["backbone"])
        replayed = ReplayedDraws(case, draws)
        backbone.set_draws(replayed)
        step: Step = learner.step(crops, knobs)
        replayed.finish()
        losses, teacher, student, gram = step.losses, step.teacher, step.student, step.gram
        networks, prefix = learner.student, ""
    _check_terms(case, losses, knobs, prefix)
    _check_views(case, teacher, student, masks)
    if gram is not None:
        tokens = config["gram"]["tokens_used"]
        chosen = {"all": ..., "masked": masks, "unmasked": ~masks}[tokens]
        case.check("out/inter/gram_global/student_patches", student.patches[chosen])
        case.check("out/inter/gram_global/teacher_patches", gram[chosen])
        if "out/loss_dict/stats_only/masked_gram_loss" in case:
            for name, chosen in (("masked", masks), ("unmasked", ~masks)):
                value = gram_loss(student.patches[chosen], gram[chosen], level="batch")
                case.check(f"out/loss_dict/stats_only/{name}_gram_loss", value)
    losses.total.backward()
    for name, parameter in official_names(networks).items():
        case.check(f"grad/{name}", parameter.grad)
    norms = clip(dict(networks.items()), None, each="module")
    case.check("out/grad_norm_total_per_module", torch.tensor(list(norms.values())))


def _knobs(case: Case) -> Knobs:
    config, step = case.settings["config"], case.settings["iteration"]
    dino, gram = config["dino"], config["gram"]
    epoch = config["train"]["OFFICIAL_EPOCH_LENGTH"]
    steps = config["optim"]["epochs"] * epoch
    local = gram_weight = 1.0
    if dino["reweight_dino_local_loss"]:
        local = block_table(dino["local_loss_weight_schedule"], epoch, steps)[step]
    if gram["use_loss"]:
        gram_weight = gram["loss_weight"]
        if gram["loss_weight_schedule"] is not None:
            gram_weight = block_table(gram["loss_weight_schedule"], epoch, steps)[step]
    return Knobs(
        step=step,
        lr=0.0,
        prototype_lr=0.0,
        weight_decay=0.0,
        momentum=1.0,
        teacher_temperature=case.settings["teacher_temp"],
        local_weight=local,
        regularizer_weight=dino["koleo_loss_weight"],
        gram_weight=gram_weight,
    )


def _check_terms(case: Case, losses: Losses, knobs: Knobs, prefix: str) -> None:
    official = {
        "dino_global": "dino_global_crops_loss",
        "dino_local": "dino_local_crops_loss",
        "ibot": "ibot_loss",
        "koleo": "koleo_loss",
        "gram": "gram_loss",
    }
    case.check("out/total_loss", losses.total)
    for name, value in losses.terms.items():
        name = name.removeprefix(prefix)
        bound = KOLEO_AT_START if name == "koleo" and case.name == "step_init" else None
        case.check(f"out/loss_dict/{official[name]}", value, bound=bound)
    case.check("out/loss_dict/dino_local_loss_weight", torch.tensor(knobs.local_weight))
    if "gram" in losses.terms:
        case.check("out/loss_dict/gram_loss_weight", torch.tensor(knobs.gram_weight))


def _check_views(case: Case, teacher: Teaching, student: Learning, masks: torch.Tensor) -> None:
    views, images = student.cls.shape[:2]
    assert student.ibot is not None
    assert student.local_logits is not None
    assert student.local_cls is not None
    assert student.local_patches is not None
    assert teacher.ibot is not None
    place = "out/inter/student_global"
    case.check(f"{place}/cls_after_head", student.logits)
    case.check(f"{place}/cls_pre_head", student.cls)
    case.check(f"{place}/masked_patch_after_head", student.ibot)
    case.check(f"{place}/masked_patch_pre_head", student.patches[masks])
    case.check(f"{place}/patch_pre_head", student.patches.unflatten(0, (views, images)))
    place = "out/inter/student_local"
    case.check(f"{place}/cls_after_head", student.local_logits)
    case.check(f"{place}/cls_pre_head", student.local_cls)
    case.check(f"{place}/patch_pre_head", student.local_patches.unflatten(0, (-1, images)))
    place = "out/inter/teacher_global"
    case.check(f"{place}/cls_after_head", teacher.logits)
    if f"{place}/cls_pre_head" in case:
        case.check(f"{place}/cls_pre_head", teacher.cls)
    case.check(f"{place}/cls_centered", teacher.dino)
    case.check(f"{place}/masked_patch_centered", teacher.ibot)

"""Kind `losses`: targets and terms of the objective in one process, with their gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from dino_adapters.pretrain.gram import Negatives, gram_loss
from dino_adapters.pretrain.losses import (
    TINY,
    dino_loss,
    ibot_dense_loss,
    ibot_loss,
    koleo_loss,
)
from dino_adapters.pretrain.masks import mask_weights
from dino_adapters.pretrain.targets import sinkhorn_knopp, softmax_centering, update_center

from ..case import Case, Settings


def read(case: Case) -> None:
    config = case.settings["config"]
    temperatures = config["teacher_temps"]
    _sinkhorn(case, temperatures)
    _dino(case, config["dino"], config["student_temp"])
    _ibot(case, config["ibot"], config["student_temp"], temperatures[1])
    _centers(case, "", temperatures[0], config["center_momentum"])
    _centers(case, "ibot_", temperatures[0], config["center_momentum"])
    _koleo(case, config["koleo"])
    for setting in config["gram"]:
        _gram(case, setting)


def _differentiate(
    case: Case, name: str, x: Tensor, loss: Callable[[Tensor], Tensor], *, gradient: bool = True
) -> None:
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf)
    case.check(f"out/{name}", value)
    if gradient:
        value.backward()
        assert leaf.grad is not None
        case.check(f"grad/{name}", leaf.grad)


def _sinkhorn(case: Case, temperatures: list[float]) -> None:
    for kind in ("dino", "ibot"):
        logits = case.tensor(f"in/{kind}_teacher_logits")
        for t in temperatures:
            case.check(f"out/{kind}_sinkhorn_temp{t}", sinkhorn_knopp(logits, temperature=t))
    logits, t = case.tensor("in/dino_teacher_logits"), temperatures[0]
    for rounds in (1, 2, 5):
        found = sinkhorn_knopp(logits, temperature=t, rounds=rounds)
        case.check(f"out/dino_sinkhorn_temp{t}_iters{rounds}", found)


def _dino(case: Case, config: Settings, temperature: float) -> None:
    images, prototypes = config["B"], config["K"]
    key = config["teacher_probs_for_the_loss"].split()[0]
    teacher = case.tensor(key).reshape(config["teacher_crops"], images, prototypes)
    crops = {
        "global": (case.tensor("in/dino_student_global"), config["student_global_crops"]),
        "local": (case.tensor("in/dino_student_local"), config["student_local_crops"]),
    }
    for name, (student, count) in crops.items():
        assert list(student.shape) == [count, images, prototypes]
        for drop in (False, True):
            square = "nonsquare_" if name == "local" and drop else ""

            def loss(x: Tensor, drop: bool = drop) -> Tensor:
                return dino_loss(x, teacher, temperature=temperature, drop_diagonal=drop)

            _differentiate(case, f"dino_{name}_{square}ign{int(drop)}", student, loss)


def _ibot(case: Case, config: Settings, temperature: float, second: float) -> None:
    config.skip("count_mismatch_value", because="the count cancels, so ours takes none")
    masks = case.tensor("in/ibot_masks")
    assert list(masks.shape) == [config["images"], config["n_tokens"]]
    student = case.tensor("in/ibot_student_logits")
    assert list(student.shape) == [config["masked_total"], config["K"]]
    balanced = sinkhorn_knopp(case.tensor("in/ibot_teacher_logits"), temperature=second)
    case.check("out/ibot_sinkhorn_count_mismatch", balanced)

    teacher = case.tensor(config["teacher_probs_for_the_loss"])
    weights = {
        "given": case.tensor("in/ibot_masks_weight"),
        "recomputed": mask_weights(masks).to(case.dtype),
    }
    for name, weight in weights.items():

        def loss(x: Tensor, weight: Tensor = weight) -> Tensor:
            return ibot_loss(x, teacher, weight, len(masks), temperature=temperature)

        _differentiate(case, f"ibot_masked_{name}", student, loss)

    probabilities = case.tensor("in/ibot_full_teacher_probs")
    _differentiate(
        case,
        "ibot_full",
        case.tensor("in/ibot_full_student_logits"),
        lambda x: ibot_dense_loss(x, probabilities, masks, temperature=temperature),
    )


def _centers(case: Case, prefix: str, temperature: float, momentum: float) -> None:
    """Three steps; an iBOT case has a leading 1, a batch of one list of masked patches."""
    shape = case.tensor(f"out/{prefix}center_used_0").shape
    center = torch.zeros(1, shape[-1], dtype=case.dtype)
    for step in range(3):
        logits = case.tensor(f"in/{prefix}center_teacher_{step}")
        case.check(f"out/{prefix}center_used_{step}", center.reshape(shape))
        found = softmax_centering(logits, center, temperature=temperature)
        case.check(f"out/{prefix}center_softmax_{step}", found)
        center = update_center(center, logits.flatten(0, -2), momentum=momentum)
    case.check(f"out/{prefix}center_final", center.reshape(shape))


def _koleo(case: Case, config: Settings) -> None:
    assert config["distributed_world_size"] == 1
    assert config["normalize_eps"] == config["distance_eps"] == config["log_eps"] == TINY
    for name in ("a", "b", "dup"):
        tokens, stored = case.tensor(f"in/koleo_{name}"), name != "dup"
        _differentiate(case, f"koleo_{name}", tokens, koleo_loss, gradient=stored)
        for most in config["topk"]:

            def loss(x: Tensor, most: int = most) -> Tensor:
                return koleo_loss(x, neighbours=most)

            _differentiate(case, f"koleo_dist_{name}_top{most}", tokens, loss, gradient=stored)


def _gram(case: Case, setting: Settings) -> None:
    number = setting["index"]
    negatives: Negatives = "keep"
    if setting["remove_neg"]:
        negatives = "clip"
    if setting["remove_only_teacher_neg"]:
        negatives = "clip_teacher"
    normalize, image = setting["apply_norm"], setting["img_level"]
    picked = setting["input_rank"] != 3
    selection, teacher = case.tensor("in/gram_selection"), case.tensor("in/gram_teacher")

    def loss(x: Tensor) -> Tensor:
        return gram_loss(
            x[selection] if picked else x,
            teacher[selection] if picked else teacher,
            level="image" if image else "batch",
            normalize=normalize,
            negatives=negatives,
        )

    _differentiate(case, f"gram_{number}", case.tensor("in/gram_student"), loss)

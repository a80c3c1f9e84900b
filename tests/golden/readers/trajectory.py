"""Kind `trajectory`: several steps of the loop, weights and optimiser after them."""

import math
from types import SimpleNamespace
from typing import Any, cast

import torch

from dino_adapters.pretrain.assemble import make_optimizer
from dino_adapters.pretrain.checkpoint import Progress
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.loop import one_step
from dino_adapters.pretrain.optim import Knobs
from dino_adapters.pretrain.run import Run
from dino_adapters.recipes.data import DataRecipe
from dino_adapters.recipes.pretrain import PretrainRecipe
from dino_adapters.recipes.sections import OptimRecipe
from dino_adapters.runtime.world import ALONE

from ..case import Case, Settings
from ..official_run import (
    crops_of,
    gram_teacher,
    official_names,
    self_distillation,
    skip_surroundings,
)
from ..tables import block_tables, old_tables

ORDER = {
    "dino_local_crops_loss": "dino_local",
    "dino_global_crops_loss": "dino_global",
    "koleo_loss": "koleo",
    "ibot_loss": "ibot",
    "gram_loss": "gram",
}


def read(case: Case) -> None:
    settings, config = case.settings, case.settings["config"]
    settings["constants"].skip("clip", because="a sentence; the norms and weights prove it")
    assert settings["constants"]["adam_eps"] == 1e-8
    skip_surroundings(case)
    learner = self_distillation(case)
    run = _run(learner, config["optim"])
    tables = _tables(config, settings["world_size"], case)
    for step in settings["steps"]:
        index = step["iteration"]
        knobs = _knobs(config, tables, index)
        outcome = one_step(run, crops_of(case, f"in/{index}/"), knobs)
        losses, norms = outcome.losses, outcome.norms
        assert outcome.applied
        case.check(f"out/{index}/grad_norms_before_clip", torch.tensor(list(norms.values())))
        named = {
            official: losses.terms[ours] for official, ours in ORDER.items() if ours in losses.terms
        }
        named |= {"total_loss": losses.total}
        named |= {"dino_local_loss_weight": torch.tensor(knobs.local_weight)}
        named |= {"gram_loss_weight": torch.tensor(knobs.gram_weight)}
        values = [named[name].double() for name in settings["loss_vector_order"]]
        case.check(f"out/{index}/losses", torch.stack(values))
        _check_rates(step, run, knobs)
        if index + 1 in settings["snapshots_after"]:
            for part, networks in (("student", learner.student), ("teacher", learner.teacher)):
                place = f"out/after{index + 1}/{part}."
                named = official_names(networks)
                for key in case.keys(place):  # not every case stores both networks
                    case.check(key, named[key.removeprefix(place)])
    assert list(learner.student) == settings["grad_norm_order"]
    _check_end(case, learner, run.optimizer)


def _run(learner: SelfDistillation, optim: Settings) -> Run:
    optim.skip("dino_head_wd_multiplier", because="it has no effect (specification, 9.1)")
    optim.skip("multi_tensor_optim", "dump_fsdp_weights_path", because="change no number")
    assert optim["optimizer"] == "adamw"
    recipe = PretrainRecipe(
        data=DataRecipe(source="none"),
        optim=OptimRecipe(
            clip=optim["clip_grad"],
            layer_decay=optim["layerwise_decay"],
            patch_embed_multiplier=optim["patch_embed_lr_mult"],
            betas=(optim["adamw_beta1"], optim["adamw_beta2"]),
            decay_rule="name",
        ),
    )
    nothing: Any = None
    optimizer = make_optimizer(learner, recipe)
    return Run(
        recipe=recipe,
        learner=learner,
        infos={},
        optimizer=optimizer,
        source=nothing,
        feed=cast(Any, SimpleNamespace(share=range(recipe.optim.batch_size))),
        views=nothing,
        progress=Progress(0, 0.0),
        notices=nothing,
        inputs={},
        world=ALONE,
        known=nothing,
        trained=list(learner.student.parameters()),
    )


def _tables(config: Settings, world_size: int, case: Case) -> dict[str, list[float]]:
    optim, teacher, epoch = (
        config["optim"],
        config["teacher"],
        config["train"]["OFFICIAL_EPOCH_LENGTH"],
    )
    teacher.skip("in_chans", because="no part of a schedule")
    steps = optim["epochs"] * epoch
    if "schedules" in config:
        unused = [key for key in optim if key not in ("epochs", "scaling_rule")]
        optim.skip(*unused, because="the schedules block stands in its place")
        teacher.skip(*teacher, because="the schedules block stands in its place")
        batch = case.tensor("in/0/global_batch_size").item() * world_size
        return block_tables(
            config["schedules"], epoch, steps, batch=int(batch), rule=optim["scaling_rule"]
        )
    optim.skip("scaling_rule", because="optim.lr is the effective value")
    old = old_tables(optim, teacher, epoch, peak=optim["lr"])
    return {name: table + [beyond] * (steps - len(table)) for name, (table, beyond) in old.items()}


def _knobs(config: Settings, tables: dict[str, list[float]], step: int) -> Knobs:
    dino, gram = config["dino"], config["gram"]
    assert not dino["reweight_dino_local_loss"]
    return Knobs(
        step=step,
        lr=tables["lr"][step],
        prototype_lr=tables["last_layer_lr"][step],
        weight_decay=tables["wd"][step],
        momentum=tables["momentum"][step],
        teacher_temperature=tables["teacher_temp"][step],
        regularizer_weight=dino["koleo_loss_weight"],
        gram_weight=gram["loss_weight"] if gram["use_loss"] else 0.0,
    )


def _check_rates(step: Settings, run: Run, knobs: Knobs) -> None:
    """Rates of the groups, as a set, and the schedules behind them."""
    step.skip("total_loss", "total_loss_float64", "metrics", because="stand in the tensors")
    said = [key for key in ("events", "after") if key in step]
    step.skip(*said, because="sentences; the weights prove them")
    for name, value in (
        ("lr", knobs.lr),
        ("last_layer_lr", knobs.prototype_lr),
        ("weight_decay", knobs.weight_decay),
        ("momentum", knobs.momentum),
        ("teacher_temp", knobs.teacher_temperature),
    ):
        assert math.isclose(step[name], value, rel_tol=1e-12, abs_tol=1e-15), name
    defaults = step.get("optimizer_defaults")
    if defaults is not None:
        assert tuple(defaults["betas"]) == run.optimizer.defaults["betas"]
        assert defaults["eps"] == run.optimizer.defaults["eps"]
    theirs = set()
    for group in step["param_groups"]:
        group.skip("lr_multiplier", "wd_multiplier", because="in the two rates")
        theirs.add(_key(group["lr"], group["weight_decay"], group["is_last_layer"]))
    ours = {
        _key(group["lr"], group["weight_decay"], group["prototype"])
        for group in run.optimizer.param_groups
        if any(parameter.numel() for parameter in group["params"])
    }
    assert ours == theirs


def _key(lr: float, weight_decay: float, prototype: bool) -> tuple[str, str, bool]:
    return f"{lr:.9e}", f"{weight_decay:.9e}", prototype


def _check_end(case: Case, learner: SelfDistillation, optimizer: torch.optim.Optimizer) -> None:
    parameters = official_names(learner.student)
    for key in case.keys("out/optim/"):
        name, value = key.removeprefix("out/optim/").rsplit("/", 1)
        found = optimizer.state[parameters[name]][value]
        case.check(key, found.reshape(case.tensor(key).shape).to(case.tensor(key).dtype))
    if case.keys("out/final/gram_teacher."):
        for name, parameter in official_names(gram_teacher(learner)).items():
            case.check(f"out/final/gram_teacher.{name}", parameter)

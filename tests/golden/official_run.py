"""Our learners, built from the settings and weights of the official training classes."""

from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters.backbones import VisionTransformer
from dino_adapters.pretrain.augment import Crops
from dino_adapters.pretrain.distill import Distillation
from dino_adapters.pretrain.learner import SelfDistillation
from dino_adapters.pretrain.masks import mask_weights
from dino_adapters.pretrain.objective import make_networks
from dino_adapters.recipes.sections import ObjectiveRecipe
from dino_adapters.recipes.teachers import GramRecipe

from .case import Case, Settings
from .networks import vit_config

HIGHER_LEVEL = "what it stands for is given in full elsewhere in the case"
PLAIN = "fp32 on one CPU here; nothing of it changes a number"
DEAD = "the official code reads it nowhere (specification, section 9.1)"
CPU = torch.device("cpu")


def skip_surroundings(case: Case) -> None:
    """Settings of the official configuration that decide nothing in these cases."""
    config = case.settings["config"]
    config.skip("MODEL", "compute_precision", because=PLAIN)
    config.skip("hrft", "multidistillation", because=DEAD)
    constants = case.settings["constants"]
    constants.skip("activation", because="a sentence; the results prove it")
    assert constants["sinkhorn_iterations"] == 3
    assert constants["head_normalize_eps"] == 1e-12
    assert constants["gram_normalize_eps"] == 1e-12
    assert all(constants["koleo"][name] == 1e-8 for name in constants["koleo"])
    train = config["train"]
    assert train["centering"] == "sinkhorn_knopp"
    train.skip(
        *(key for key in train if key not in ("centering", "OFFICIAL_EPOCH_LENGTH")), because=PLAIN
    )
    crops = config["crops"]
    crops.skip(*crops, because="crops are stored as tensors")


def backbone_of(student: Settings, norm_eps: Settings) -> VisionTransformer:
    """An untrained ViT for the official `student` section."""
    named = [key for key in ("arch", "arch_dims") if key in student]
    student.skip(*named, because=HIGHER_LEVEL)
    student.skip("pretrained_weights", "resume_from_teacher_chkpt", because="weights are given")
    student.skip("fp8_enabled", "fp8_filter", "pos_embed_type", because=PLAIN)
    rename = {"layerscale": "layerscale_init"}
    values = {rename.get(key, key): student[key] for key in student if key not in _OTHER}
    arguments = Settings({"img_size": 0} | values)
    config = vit_config(arguments, norm_eps)
    assert not arguments.unread(), arguments.unread()
    return VisionTransformer(config, drop_path=student["drop_path_rate"])


_OTHER = {
    "arch",
    "arch_dims",
    "pretrained_weights",
    "resume_from_teacher_chkpt",
    "fp8_enabled",
    "fp8_filter",
    "pos_embed_type",
    "drop_path_rate",
}


def objective_of(dino: Settings, ibot: Settings, student_temp: float) -> ObjectiveRecipe:
    """Our objective for the official sections."""
    dead = ("head_norm_last_layer", "force_weight_norm", "koleo_distributed_loss_group_data")
    dino.skip(*dead, "koleo_distributed_replicas", because=DEAD)
    dino.skip("koleo_loss_distributed", because="with one rank both classes are one function")
    dino.skip("reweight_dino_local_loss", "local_loss_weight_schedule", because="read by knobs")
    ibot.skip("head_norm_last_layer", "force_masking_even_with_zero_weight", because=DEAD)
    ibot.skip(
        "mask_sample_probability",
        "mask_ratio_min_max",
        "mask_random_circular_shift",
        because="masks are stored as tensors",
    )
    assert ibot["separate_head"]
    assert dino["head_nlayers"] == ibot["head_nlayers"]
    return ObjectiveRecipe(
        dino_weight=dino["loss_weight"],
        ibot_weight=ibot["loss_weight"],
        drop_diagonal=dino["global_ignore_diagonal"],
        regularizer_weight=dino["koleo_loss_weight"],
        koleo_neighbours=dino["koleo_topk"],
        koleo_group=dino["koleo_distributed_loss_group_size"],
        prototypes=dino["head_n_prototypes"],
        hidden_dim=dino["head_hidden_dim"],
        bottleneck_dim=dino["head_bottleneck_dim"],
        head_layers=dino["head_nlayers"],
        ibot_prototypes=ibot["head_n_prototypes"],
        ibot_hidden_dim=ibot["head_hidden_dim"],
        ibot_bottleneck_dim=ibot["head_bottleneck_dim"],
        student_temperature=student_temp,
    )


def gram_of(gram: Settings) -> GramRecipe | None:
    """Our Gram section for the official one, None where it is off."""
    unused = ("compute_stats", "loss_weight_schedule")
    gram.skip(*(key for key in unused if key in gram), because="read by the step's reader")
    if not gram["use_loss"]:
        gram.skip(*gram, because="Gram is off")
        return None
    both, teacher_alone = gram["remove_neg"], gram["remove_only_teacher_neg"]
    negatives = "clip" if both else "clip_teacher" if teacher_alone else "keep"
    load, given = gram["it_load_ema_teacher"], gram["ckpt"] == "given"
    live, refresh = gram["ema_teacher"], gram["rep_update"]
    refresh_every = gram["update_frequency"]
    return GramRecipe(
        teacher="live" if live else "given" if given else "ema",
        copy_at=None if live or load < 0 else load,
        refresh_every=refresh_every if refresh and not live else None,
        first_refresh=gram["it_first_update"],
        max_refreshes=gram["max_updates"],
        weight=gram["loss_weight"],
        level="image" if gram["img_level"] else "batch",
        normalize=gram["normalized"],
        negatives=negatives,
        tokens=gram["tokens_used"],
        resize=gram["global_teacher_resize_method"],
        antialias=gram["global_teacher_resize_antialias"],
    )


def load_official(networks: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fills networks from tensors by their official names."""
    ours = {k.replace("storage_tokens", "register_tokens"): v for k, v in tensors.items()}
    if "backbone.register_tokens" not in ours:  # with no register, theirs has no such parameter
        empty = networks.state_dict()["backbone.register_tokens"]
        assert empty.numel() == 0
        ours["backbone.register_tokens"] = empty
    networks.load_state_dict(ours)


def self_distillation(case: Case) -> SelfDistillation:
    """Student, teacher and Gram teacher of a case."""
    config, constants = case.settings["config"], case.settings["constants"]
    assert not config["distillation"]["enabled"]
    gram = gram_of(config["gram"])
    gram_network = None
    if case.keys("w/gram_teacher."):
        gram_network = backbone_of(config["student"], constants["norm_eps"])
    learner = SelfDistillation(
        backbone_of(config["student"], constants["norm_eps"]),
        objective_of(config["dino"], config["ibot"], constants["student_temp"]),
        seed=0,
        device=CPU,
        bf16=False,
        gram=gram,
        gram_network=gram_network,
    )
    parts: list[tuple[str, nn.Module]] = [
        ("student", learner.student),
        ("teacher", learner.teacher),
    ]
    for name, networks in parts:
        load_official(networks.to(case.dtype), case.tensors(f"w/{name}."))
    if gram_network is not None:
        load_official(gram_teacher(learner).to(case.dtype), case.tensors("w/gram_teacher."))
    return learner


def gram_teacher(learner: SelfDistillation) -> nn.ModuleDict:
    """The Gram teacher, named as in the official state."""
    assert learner.gram is not None
    assert learner.gram.network is not None
    return nn.ModuleDict({"backbone": learner.gram.network})


def distillation(case: Case) -> Distillation:
    """Frozen teacher and student of a case; the student's name is empty."""
    config, constants = case.settings["config"], case.settings["constants"]
    frozen = config["distillation"]["teacher"]
    frozen.skip("arch_dims", because=HIGHER_LEVEL)
    assert gram_of(config["gram"]) is None
    told = objective_of(frozen["dino"], frozen["ibot"], constants["student_temp"])
    teacher = make_networks(backbone_of(frozen["student"], constants["norm_eps"]), told, seed=0)
    load_official(teacher.to(case.dtype), case.tensors("w/teacher."))
    case.tensors("w/model_ema.")  # the student's average, which one step does not need
    learner = Distillation(
        teacher,
        {"student": backbone_of(config["student"], constants["norm_eps"])},
        objective_of(config["dino"], config["ibot"], constants["student_temp"]),
        seed=0,
        device=CPU,
        bf16=False,
    )
    load_official(learner.students["student"].to(case.dtype), case.tensors("w/student."))
    return learner


def crops_of(case: Case, prefix: str) -> Crops:
    """The stored batch, whose indices, weights and counts must be those of its masks."""
    masks = case.tensor(f"{prefix}collated_masks")
    case.check(f"{prefix}mask_indices_list", masks.flatten().nonzero().flatten())
    case.check(f"{prefix}n_masked_patches", masks.sum()[None])
    case.tensor(f"{prefix}upperbound")  # no loss reads it
    images = int(case.tensor(f"{prefix}global_batch_size"))
    case.check(f"{prefix}masks_weight", mask_weights(masks), bound=1e-7)
    gram = f"{prefix}collated_gram_teacher_crops"
    return Crops(
        case.tensor(f"{prefix}collated_global_crops"),
        case.tensor(f"{prefix}collated_local_crops"),
        masks,
        images,
        case.tensor(gram) if gram in case else None,
    )


def official_names(networks: nn.Module) -> dict[str, Any]:
    """Parameters by their official names; ours without any element are left out."""
    return {
        name.replace("register_tokens", "storage_tokens"): parameter
        for name, parameter in networks.named_parameters()
        if parameter.numel()
    }

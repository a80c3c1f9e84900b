"""Kind `param_groups`: rates of every parameter, and how many groups they make."""

import torch
from torch import nn

from dino_adapters.backbones import ConvNeXt, ConvNeXtConfig, VisionTransformer, ViTConfig
from dino_adapters.pretrain.optim import parameter_groups
from dino_adapters.pretrain.prototypes import ProjectionHead

from ..case import Case, Settings
from ..networks import OURS

EXACT = 1e-12
"""Rounding of float64."""


def read(case: Case) -> None:
    specs = case.settings["config"]["specs"]
    case.check("out/n_specs", torch.tensor(len(specs)))
    for spec in specs:
        _read_spec(case, spec)


def _read_spec(case: Case, spec: Settings) -> None:
    optim = spec["optim"]
    optim.skip(
        "dino_head_wd_multiplier",
        because="never acts there: names within a head lack the word that it looks for",
    )
    module = BUILDERS[spec["submodule"]](spec["kwargs"])
    groups = parameter_groups(
        {"it": module},
        layer_decay=optim["layerwise_decay"],
        patch_embed=optim["patch_embed_lr_mult"],
        decay_rule="name",
    )
    assert len(groups) == spec["n_fused_groups"]
    found = {id(p): group for group in groups for p in group["params"]}
    # Ours has a tensor of no registers where there are none.
    parameters = {name: p for name, p in module.named_parameters() if p.numel()}
    expected: dict[str, Settings] = {}
    for entry in spec["groups"]:
        name: str = entry["name"]
        expected[OURS.get(name, name)] = entry
    assert set(parameters) == set(expected)
    for name, entry in expected.items():
        group = found[id(parameters[name])]
        assert list(parameters[name].shape) == entry["shape"]
        assert group["prototype"] == entry["is_last_layer"]
        values = entry["lr_multiplier"], entry["wd_multiplier"]
        case.check_values(
            f"out/{name}",
            torch.tensor(
                [group["lr_multiplier"], group["weight_decay_multiplier"]], dtype=torch.float64
            ),
            torch.tensor(values, dtype=torch.float64),
            bound=EXACT,
        )


def _vit(kwargs: Settings) -> nn.Module:
    kwargs.skip("img_size", because="rotary positions need no image size")
    ffn = kwargs.get("ffn_layer", "mlp")
    config = ViTConfig(
        embed_dim=kwargs["embed_dim"],
        depth=kwargs["depth"],
        num_heads=kwargs["num_heads"],
        patch_size=kwargs["patch_size"],
        registers=kwargs["n_storage_tokens"],
        ffn="mlp" if ffn == "mlp" else "swiglu",
        swiglu_align=int(ffn.removeprefix("swiglu")) if ffn != "mlp" else 8,
        qkv_bias=kwargs.get("qkv_bias", True),
        mask_k_bias=kwargs["mask_k_bias"],
        layerscale=kwargs["layerscale_init"],
        untie_cls_norm=kwargs["untie_cls_and_patch_norms"],
        untie_local_cls_norm=kwargs["untie_global_and_local_cls_norm"],
    )
    return VisionTransformer(config)


def _head(kwargs: Settings) -> nn.Module:
    return ProjectionHead(
        kwargs["in_dim"],
        kwargs["out_dim"],
        hidden_dim=kwargs["hidden_dim"],
        bottleneck_dim=kwargs["bottleneck_dim"],
        layers=kwargs["nlayers"],
    )


def _convnext(kwargs: Settings) -> nn.Module:
    return ConvNeXt(ConvNeXtConfig(depths=tuple(kwargs["depths"]), dims=tuple(kwargs["dims"])))


BUILDERS = {"vit": _vit, "head": _head, "convnext": _convnext}

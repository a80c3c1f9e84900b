"""Networks from golden settings and weights, through the door that users take."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dino_adapters import load_backbone
from dino_adapters.backbones import ConvNeXtConfig, FrozenBackbone, ViTConfig, build_network

from .case import Case, Settings

OURS = {"storage_tokens": "register_tokens"}
"""Official parameter names that differ from ours."""


def vit_config(config: Settings, norm_eps: Settings, **changes: Any) -> ViTConfig:
    """Our config for the official constructor arguments; takes every one of them.

    Args:
        config: Constructor arguments of the official ViT.
        norm_eps: eps by the official name of the norm.
        **changes: Fields of ours that replace those read.
    """
    config.skip("img_size", because="rotary positions need no image size")
    norm_eps.skip(*norm_eps, because="a table of all norms, of which a network has one")
    norm, ffn = config["norm_layer"], config["ffn_layer"]
    fields = {
        "embed_dim": config["embed_dim"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "patch_size": config["patch_size"],
        "in_channels": config["in_chans"],
        "registers": config["n_storage_tokens"],
        "ffn": "mlp" if ffn == "mlp" else "swiglu",
        "ffn_ratio": config["ffn_ratio"],
        "swiglu_align": int(ffn.removeprefix("swiglu") or 8) if ffn != "mlp" else 8,
        "qkv_bias": config["qkv_bias"],
        "mask_k_bias": config["mask_k_bias"],
        "proj_bias": config["proj_bias"],
        "ffn_bias": config["ffn_bias"],
        "layerscale": config["layerscale_init"],
        "norm": "rmsnorm" if norm == "rmsnorm" else "layernorm",
        "norm_eps": norm_eps[norm],
        "untie_cls_norm": config["untie_cls_and_patch_norms"],
        "untie_local_cls_norm": config["untie_global_and_local_cls_norm"],
        "rope_base": config["pos_embed_rope_base"],
        "rope_min_period": config["pos_embed_rope_min_period"],
        "rope_max_period": config["pos_embed_rope_max_period"],
        "rope_coordinates": config["pos_embed_rope_normalize_coords"],
        "rope_shift": config["pos_embed_rope_shift_coords"],
        "rope_jitter": config["pos_embed_rope_jitter_coords"],
        "rope_rescale": config["pos_embed_rope_rescale_coords"],
        "rope_dtype": config["pos_embed_rope_dtype"],
    }
    return ViTConfig(**(fields | changes))


def official_backbone(
    weights: dict[str, Tensor], architecture: ViTConfig | ConvNeXtConfig
) -> FrozenBackbone:
    """What `load_backbone` makes of a file with these tensors, by their official names."""
    with TemporaryDirectory() as folder:
        return load_backbone(_saved(weights, folder), architecture=architecture)


def official_network(
    weights: dict[str, Tensor],
    architecture: ViTConfig | ConvNeXtConfig,
    dtype: torch.dtype,
    *,
    drop_path: float = 0.0,
) -> Any:
    """A trainable network in eval mode, from a file with these tensors."""
    with TemporaryDirectory() as folder:
        network, _ = build_network(
            _saved(weights, folder), architecture=architecture, drop_path=drop_path
        )
    return network.to(dtype)


def _saved(weights: dict[str, Tensor], folder: str) -> Path:
    path = Path(folder) / "official.pth"
    torch.save(weights, path)
    return path


def check_gradients(case: Case, network: nn.Module, loss: Tensor) -> None:
    """Gradients of all parameters; the case has one for each that the loss depends on."""
    network.zero_grad()
    loss.backward()
    theirs = {ours: official for official, ours in OURS.items()}
    named = {theirs.get(name, name): value for name, value in network.named_parameters()}
    for name, value in named.items():
        if value.grad is None:
            assert f"grad/{name}" not in case, f"{name} has no gradient here, but has one there"
        else:
            case.check(f"grad/{name}", value.grad)

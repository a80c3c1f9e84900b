"""Learned positions: the table, the network with it, and timm's networks with the same weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from dino_adapters.backbones import (
    VisionTransformer,
    ViTConfig,
    build_network,
    export_backbone,
    load_backbone,
)
from dino_adapters.backbones.convert import fit, recognise, settle_biases, to_ours, to_timm
from dino_adapters.backbones.infer import infer_vit
from dino_adapters.backbones.positions import resample_table, table_side
from dino_adapters.contracts import RecipeError, WeightsError
from dino_adapters.runtime.console import Notices

LEARNED: dict[str, Any] = {
    "embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "registers": 0,
    "mask_k_bias": False, "norm_eps": 1e-6, "positions": "learned", "position_grid": 5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "dinov2": {},
    "registers": {"registers": 4},
    "dino": {"layerscale": None, "patch_size": 16},
    "swiglu": {"ffn": "swiglu", "embed_dim": 128, "num_heads": 2},
    "plain": {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    "masked": {"mask_k_bias": True, "untie_local_cls_norm": True},
}
NAMES = {
    "dinov2": "vit_small_patch14_dinov2",
    "registers": "vit_small_patch14_reg4_dinov2",
    "dino": "vit_small_patch16_224",
    "swiglu": "vit_giant_patch14_dinov2",
    "plain": "vit_small_patch14_dinov2",
    "masked": "vit_small_patch14_dinov2",
}
SMALL: dict[str, Any] = {"num_classes": 0, "embed_dim": 64, "depth": 2, "num_heads": 1}
TOLERANCE = 1e-5


def config(**changes: Any) -> ViTConfig:
    return ViTConfig(**{**LEARNED, **changes})


def tokens(features):
    return torch.cat([features.cls[:, None], features.registers, features.patches], 1)


def square(network) -> torch.Tensor:
    side = network.config.position_grid * network.patch_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


# The table


def test_its_own_grid_gives_the_table_itself():
    table = torch.randn(1, 17, 3)
    assert resample_table(table, 4, (4, 4)) is table


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("grid", [(2, 3), (5, 5), (7, 4)])
def test_the_table_is_resampled_as_by_a_loop(grid):
    side = 4
    table = torch.randn(1, 1 + side**2, 3, dtype=torch.float64)
    rows = table[0, 1:].unflatten(0, (side, side))
    expected = torch.zeros(*grid, 3, dtype=torch.float64)
    for y, x in itertools.product(*map(range, grid)):
        places = [(at + 0.5) * side / count - 0.5 for at, count in zip((y, x), grid, strict=True)]
        for i, j in itertools.product(range(-2, side + 2), repeat=2):
            inside = rows[min(max(i, 0), side - 1), min(max(j, 0), side - 1)]
            expected[y, x] += cubic(places[0] - i) * cubic(places[1] - j) * inside
    found = resample_table(table, side, grid)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[0, 1:].unflatten(0, grid), expected)
    assert torch.equal(found[:, 0], table[:, 0])  # CLS is at no place


def test_half_precision_is_resampled_in_float32():
    table = torch.randn(1, 17, 3).bfloat16()
    expected = resample_table(table.float(), 4, (3, 5)).bfloat16()
    assert torch.equal(resample_table(table, 4, (3, 5)), expected)


def test_lengths_of_tables():
    assert [table_side(n) for n in (1, 2, 5, 6, 197)] == [None, 1, 2, None, 14]


# The network


def test_names_of_the_state():
    learned = set(VisionTransformer(config(mask_k_bias=True)).state_dict())
    rotary = set(VisionTransformer(config(mask_k_bias=True, positions="rope")).state_dict())
    assert learned - rotary == {"pos_embed"}
    assert rotary - learned == {"rope_embed.periods"}


def test_the_table_starts_as_a_truncated_normal():
    network = VisionTransformer(config(position_grid=20, embed_dim=128))
    network.reset_parameters(torch.Generator().manual_seed(0))
    assert network.pos_embed is not None
    assert network.pos_embed.shape == (1, 401, 128)
    assert network.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)


@torch.no_grad()
def test_what_enters_the_first_block(scatter):
    network = scatter(VisionTransformer(config(registers=2)))
    images, mask = torch.randn(2, 3, 42, 28), torch.rand(2, 6) < 0.5
    entered = []
    network.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))
    network.forward_crops([images], [mask])
    table = resample_table(network.pos_embed, 5, (3, 2))
    cls, registers, patches = entered[0].split([1, 2, 6], dim=1)
    assert torch.equal(cls, (network.cls_token + table[:, :1]).expand(2, -1, -1))
    assert torch.equal(registers, network.register_tokens.expand(2, -1, -1))
    hidden = (network.mask_token + table[0, 1:]).expand(2, -1, -1)
    torch.testing.assert_close(patches[mask], hidden[mask])
    seen = network.patch_embed(images)[0] + table[:, 1:]
    torch.testing.assert_close(patches[~mask], seen[~mask])


def test_the_table_learns_from_crops_of_any_size():
    network = VisionTransformer(config(layerscale=1.0), drop_path=0.3).train()
    crops = [torch.randn(2, 3, 70, 70), torch.randn(3, 3, 28, 42)]
    features = network.forward_crops(crops, [torch.rand(2, 25) < 0.5, None])
    assert features[1].grid == (2, 3)
    for group in features:
        network.zero_grad()
        group.patches.square().mean().backward(retain_graph=True)
        assert network.pos_embed is not None
        assert network.pos_embed.grad is not None
        assert bool(network.pos_embed.grad.any(-1).all())


@torch.no_grad()
def test_class_attention(scatter):
    network = scatter(VisionTransformer(config(registers=3)))
    found = network.cls_attention(torch.randn(2, 3, 28, 42))
    assert found.shape == (2, 1, 6)
    assert bool((found.sum(-1) < 1).all())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 3}, "64 does not divide into 3 heads"),
        ({"position_grid": 0}, "position_grid is 0"),
        ({"positions": "learnt"}, "positions is 'learnt'"),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(RecipeError, match=said):
        config(**changes)
    # Only rotary positions need heads of a multiple of 4 and periods.
    assert config(embed_dim=30, num_heads=5, rope_base=None).embed_dim == 30


# Against timm. At other grids than the table's own timm resamples with antialiasing, whose cubic is
# another one, so that nothing is compared there.


@pytest.mark.parametrize("grid", [5, 9])
@pytest.mark.parametrize("kind", ["dinov2", "registers", "dino", "swiglu"])
@torch.no_grad()
def test_weights_of_timm_give_its_outputs(kind, grid, scatter, record_property):
    size = KINDS[kind].get("patch_size", 14) * grid
    sizes = {**SMALL, "num_heads": 2, "embed_dim": 128} if kind == "swiglu" else SMALL
    theirs: Any = scatter(timm.create_model(NAMES[kind], img_size=size, **sizes))
    assert recognise(theirs.state_dict()) == ("timm", "vit")
    state = to_ours(theirs.state_dict(), ("timm", "vit"))
    found = infer_vit(state)
    assert (found.positions, found.position_grid, found.norm_eps) == ("learned", grid, 1e-6)
    assert found.registers == (4 if kind == "registers" else 0)
    assert (found.ffn, found.mask_k_bias) == ("swiglu" if kind == "swiglu" else "mlp", False)
    assert (found.layerscale is None) == (kind == "dino")
    ours = VisionTransformer(found).eval()
    fit(ours, {**ours.state_dict(), **settle_biases(state, found, Notices())}, "'x'")
    images = square(ours)
    expected = theirs.forward_features(images)
    worst = (tokens(ours(images)) - expected).abs().max().item()
    record_property(f"{kind} {grid}", worst)
    print(f"timm {kind}, grid {grid}: max abs difference {worst:.2e}")
    assert expected.std() > 0.3
    assert worst < TOLERANCE
    if kind == "registers":
        assert not state["pos_embed"][:, 0].any()


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_exports_open_in_timm_and_come_back(kind, scatter, tmp_path):
    network = scatter(VisionTransformer(config(**KINDS[kind])))
    _, info = build_network(network)
    info = dataclasses.replace(info, name="mine", licence="none")
    folder = export_backbone(network, info, tmp_path / "out")
    formats = json.loads((folder / "card.json").read_text())["formats"]
    assert "positions are learned" in formats["transformers"]["why_not"]
    assert not (folder / "transformers").exists()
    assert "antialiasing" in formats["timm"]["note"]
    facts = json.loads((folder / "timm" / "config.json").read_text())
    assert facts["architecture"] == NAMES[kind]

    images = square(network)
    expected = tokens(network(images))
    theirs: Any = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    assert (theirs.forward_features(images) - expected).abs().max() < TOLERANCE
    assert torch.allclose(theirs(images), expected[:, 0], atol=TOLERANCE)
    oblong = images[..., : -2 * network.patch_size]
    assert theirs.forward_features(oblong).shape == tokens(network(oblong)).shape

    again = load_backbone(folder)
    assert torch.equal(tokens(again(images)), expected)
    back = load_backbone(folder / "timm")
    assert back.info.family == "vit"
    for some in (images, oblong):  # as our own, resampled in our way
        assert torch.allclose(tokens(back(some)), tokens(network(some)), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_eps": 1e-5}, "eps is 1e-05"),
        ({"ffn_bias": False}, "one of proj_bias and ffn_bias"),
        ({"norm": "rmsnorm"}, "norms are rmsnorm"),
        ({"untie_cls_norm": True}, "norm of their own"),
    ],
)
def test_what_timm_cannot_hold_is_said(changes, said, scatter, tmp_path):
    network = scatter(VisionTransformer(config(**changes)))
    folder = export_backbone(network, build_network(network)[1], tmp_path / "out")
    formats = json.loads((folder / "card.json").read_text())["formats"]
    assert said in formats["timm"]["why_not"]
    assert not (folder / "timm").exists()


# Files


@torch.no_grad()
def test_files_with_and_without_mask_token(scatter, tmp_path):
    network = scatter(VisionTransformer(config()))
    state = network.state_dict()
    state.pop("register_tokens")  # as in DINOv2's own files without registers
    assert recognise(state) == ("official", "vit")
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "a.safetensors"
    )
    ours, info = build_network(tmp_path / "a.safetensors")
    assert info.architecture == dataclasses.asdict(network.config)
    images = torch.randn(1, 3, 28, 42)
    assert torch.equal(tokens(ours(images)), tokens(network(images)))
    assert torch.equal(ours.mask_token, network.mask_token)

    save_file(to_timm(network.state_dict(), "vit"), tmp_path / "b.safetensors")
    architecture = {key: LEARNED[key] for key in ("embed_dim", "depth", "num_heads")}
    ours, _ = build_network(
        "vits14_dinov2",
        architecture={**architecture, "position_grid": 5},
        checkpoint=tmp_path / "b.safetensors",
    )
    assert torch.equal(tokens(ours(images)), tokens(network(images)))
    assert not ours.mask_token.any()


def test_other_tables_are_refused():
    state = VisionTransformer(config()).state_dict()
    state["pos_embed"] = torch.zeros(1, 24, 64)
    with pytest.raises(WeightsError, match="pos_embed has 24 rows"):
        infer_vit(state)
    theirs = to_timm(VisionTransformer(config()).state_dict(), "vit")
    with pytest.raises(WeightsError, match="position table has 24 rows"):
        to_ours({**theirs, "pos_embed": state["pos_embed"]}, ("timm", "vit"))
    with pytest.raises(WeightsError, match="norm_pre"):
        to_ours({**theirs, "norm_pre.weight": torch.zeros(64)}, ("timm", "vit"))
    # A classifier's network stays timm's.
    assert recognise({**theirs, "head.weight": torch.zeros(2, 64)}) is None

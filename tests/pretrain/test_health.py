"""Signs of health, against loops over numbers and against features whose answers are known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dino_adapters.backbones import build_network
from dino_adapters.contracts import Features, NotFiniteError, ShapeError
from dino_adapters.features.dense import patch_consistency
from dino_adapters.pretrain import health
from dino_adapters.pretrain.health import (
    cls_cosine,
    dead_level,
    duplicate_prototypes,
    look_at,
    marginal_entropy,
    prototypes_used,
    rankme,
    row_entropy,
)
from dino_adapters.pretrain.prototypes import ProjectionHead

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assignments(n=9, count=6, sharpness=3.0, seed=0):
    return (sharpness * draws(n, count, seed=seed)).softmax(1)


def slow_entropy(p):
    return -sum(v * math.log(v) for v in p if v > 0)


# Single signs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (1, 4)])
def test_rankme_is_the_entropy_of_singular_values(shape, dtype):
    x = draws(*shape, dtype=dtype)
    # Singular values by another road: roots of the eigenvalues of x xᵀ.
    values = np.sqrt(np.linalg.eigvalsh(x.double().numpy() @ x.double().numpy().T).clip(1e-24))
    expected = math.exp(slow_entropy(values / values.sum()))
    assert rankme(x) == pytest.approx(expected, rel=1e-6)
    assert 1 <= rankme(x) <= min(shape) + 1e-9


def test_rankme_of_known_matrices():
    assert rankme(torch.eye(7)) == pytest.approx(7)
    assert rankme(draws(6, 1) * draws(1, 4, seed=1)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(3, 4)) == 0.0
    assert rankme(5e4 * draws(8, 4)) == pytest.approx(rankme(draws(8, 4)), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_cosine_is_that_of_all_different_pairs(dtype):
    x = draws(7, 4, dtype=dtype) + 0.5
    rows = x.double().numpy()
    pairs = [
        rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    assert cls_cosine(x) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_mean_cosine_of_known_rows():
    assert cls_cosine(torch.ones(4, 3)) == pytest.approx(1)
    assert cls_cosine(torch.eye(4)) == pytest.approx(0)
    assert cls_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1)
    assert cls_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == 0


def test_entropies_of_rows_and_of_their_mean():
    p = assignments()
    rows = p.double().numpy()
    assert row_entropy(p) == pytest.approx(np.mean([slow_entropy(row) for row in rows]), rel=1e-5)
    assert marginal_entropy(p) == pytest.approx(slow_entropy(rows.mean(0)), rel=1e-5)
    assert row_entropy(p) <= marginal_entropy(p) <= dead_level(6)


def test_entropies_of_known_rows():
    uniform, certain = torch.full((4, 8), 1 / 8), torch.eye(4, 8)
    assert row_entropy(uniform) == pytest.approx(dead_level(8))
    assert row_entropy(certain) == 0
    assert marginal_entropy(certain) == pytest.approx(math.log(4))
    assert marginal_entropy(certain[:1].expand(5, -1)) == 0


def test_prototypes_in_use():
    p = assignments(n=20, count=50)
    assert prototypes_used(p) == len({max(range(50), key=row.__getitem__) for row in p.tolist()})
    assert prototypes_used(torch.eye(6, 9)[[0, 0, 2, 2, 5, 5]]) == 3


def test_entropies_stay_exact_with_many_prototypes():
    p = assignments(n=4, count=65_536, sharpness=2.0)
    assert row_entropy(p) == pytest.approx(row_entropy(p.double()), rel=1e-6)
    assert marginal_entropy(p) == pytest.approx(marginal_entropy(p.double()), rel=1e-6)


@pytest.mark.parametrize("above", [0.5, 0.9, 0.975])
@pytest.mark.parametrize("block", [(2048, 8192), (4, 8), (4, 12), (16, 16)])
def test_twins_are_those_of_all_pairs(monkeypatch, block, above):
    monkeypatch.setattr(health, "BLOCK", block)
    weights = draws(37, 5)
    weights[30] = 3 * weights[2] + 0.01  # far apart in the list, of another length
    weights[36] = weights[35]
    rows = weights.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    twins = {i for i in range(37) for j in range(37) if i != j and rows[i] @ rows[j] > above}
    assert duplicate_prototypes(weights, above) == pytest.approx(len(twins) / 37)


def test_twins_of_known_prototypes():
    assert duplicate_prototypes(torch.eye(5)) == 0
    assert duplicate_prototypes(torch.ones(5, 3)) == 1
    assert duplicate_prototypes(torch.zeros(5, 3)) == 0
    assert duplicate_prototypes(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0
    assert duplicate_prototypes(draws(1, 3)) == 0


def test_autocast_does_not_round_twins():
    near = torch.tensor([[1.0, 0.0], [0.9755, 0.22]])  # cosine 0.9755: bf16 would say 0.9766
    apart = torch.tensor([[1.0, 0.0], [0.9745, 0.2244]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert duplicate_prototypes(near) == 1
        assert duplicate_prototypes(apart) == 0


def test_misshapen_rows_are_refused():
    for sign in (rankme, row_entropy, marginal_entropy, prototypes_used, duplicate_prototypes):
        with pytest.raises(ShapeError, match="1 or more rows"):
            sign(torch.zeros(0, 3))
    with pytest.raises(ShapeError, match="2 or more rows"):
        cls_cosine(torch.ones(1, 3))
    with pytest.raises(ShapeError, match="Give a matrix"):
        rankme(torch.zeros(2, 3, 4))


# A whole look


class Stub(nn.Module):
    """Patches are means over squares of 4 pixels, sent through a matrix; the class token too."""

    def __init__(self, bands=3, width=6, side=4, broken=False):
        super().__init__()
        self.matrix = nn.Parameter(draws(bands, width))
        self.side, self.broken, self.seen, self.modes = side, broken, [], set()
        self.draw = nn.Dropout(0.5)

    def forward(self, images):
        self.seen.append(len(images))
        self.modes.add(self.training)
        maps = torch.nn.functional.avg_pool2d(images, self.side)
        patches = self.draw(maps.flatten(2).mT @ self.matrix)
        cls = patches.square().mean(1)
        if self.broken:
            cls = cls / 0
        return Features(cls, patches[:, :0], patches, (maps.shape[2], maps.shape[3]))


def teacher(head=True, **options) -> Any:
    networks: dict[str, nn.Module] = {"backbone": Stub(**options)}
    if head:
        networks["dino_head"] = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4)
        networks["dino_head"].reset_parameters(torch.Generator().manual_seed(0), prototype_norm=1.0)
    return nn.ModuleDict(networks)


KEYS = ["rankme", "cls_cosine", "cls_patch_cosine", "patch_consistency"]
HEAD_KEYS = ["row_entropy", "marginal_entropy", "prototypes_used", "prototypes_duplicated"]


@torch.no_grad()
def test_a_look_has_every_sign_of_its_tokens():
    networks, images = teacher().eval(), draws(5, 3, 12, 16)
    found = look_at(networks, images, temperature=0.07)
    assert list(found) == KEYS + HEAD_KEYS
    seen = networks["backbone"](images)
    assert found["rankme"] == pytest.approx(rankme(seen.cls))
    assert found["cls_cosine"] == pytest.approx(cls_cosine(seen.cls))
    near = [
        float(torch.nn.functional.cosine_similarity(cls, patch, dim=0))
        for cls, patches in zip(seen.cls, seen.patches, strict=True)
        for patch in patches
    ]
    assert found["cls_patch_cosine"] == pytest.approx(np.mean(near), abs=1e-6)
    p = (networks["dino_head"](seen.cls) / 0.07).softmax(1)
    assert found["row_entropy"] == pytest.approx(row_entropy(p), rel=1e-5)
    assert found["marginal_entropy"] == pytest.approx(marginal_entropy(p), rel=1e-5)
    assert found["prototypes_used"] == prototypes_used(p)


def test_the_mirror_image_is_mirrored_back():
    """This network sees every place by itself, so both views must agree to rounding."""
    found = look_at(teacher(), draws(4, 3, 12, 16), temperature=0.07)
    assert found["patch_consistency"] == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_consistency_is_compared_place_by_place():
    class Leaning(Stub):
        def forward(self, images):
            return super().forward(images * torch.linspace(0, 1, images.shape[-1]))

    networks, images = nn.ModuleDict({"backbone": Leaning()}).eval(), draws(3, 3, 12, 16)
    plain, mirrored = networks["backbone"](images), networks["backbone"](images.flip(-1))
    h, w = plain.grid
    each = []
    for image in range(3):
        back = [mirrored.patches[image, y * w + (w - 1 - x)] for y in range(h) for x in range(w)]
        each.append(patch_consistency(plain.patches[image], torch.stack(back)))
    found = look_at(networks, images, temperature=0.07)["patch_consistency"]
    assert found == pytest.approx(np.mean(each), abs=1e-6)
    assert found < 0.99


def test_batches_change_nothing_but_memory():
    networks, images = teacher(), draws(7, 3, 12, 16)
    whole = look_at(networks, images, temperature=0.07)
    networks["backbone"].seen.clear()
    assert look_at(networks, images, temperature=0.07, batch=3) == pytest.approx(whole, rel=1e-5)
    assert networks["backbone"].seen == [3, 3, 3, 3, 1, 1]


def test_without_a_head_there_are_no_prototypes():
    assert list(look_at(teacher(head=False), draws(4, 3, 12, 16), temperature=0.07)) == KEYS


def test_too_few_patches_have_no_pattern():
    found = look_at(teacher(head=False), draws(4, 3, 4, 8), temperature=0.07)
    assert list(found) == KEYS[:3]


def test_images_without_a_pattern_do_not_count():
    images = draws(4, 3, 12, 16)
    images[1:] = 1.0
    found = look_at(teacher(head=False), images, temperature=0.07)
    assert found["patch_consistency"] == pytest.approx(1, abs=1e-6)
    images[0] = 1.0
    assert math.isnan(look_at(teacher(head=False), images, temperature=1.0)["patch_consistency"])


def test_a_look_is_in_eval_mode_and_leaves_modes_and_gradients_alone():
    networks, images = teacher().train(), draws(4, 3, 12, 16)
    networks["backbone"].draw.eval()
    images.requires_grad_(True)
    found = look_at(networks, images, temperature=0.07)
    assert networks["backbone"].modes == {False}
    assert networks.training
    assert networks["backbone"].training
    assert not networks["backbone"].draw.training
    assert all(parameter.grad is None for parameter in networks.parameters())
    assert found == look_at(networks, images, temperature=0.07)


def test_a_constant_network_shows_everywhere():
    networks = teacher()
    with torch.no_grad():
        networks["dino_head"].last_layer.weight[1:] = networks["dino_head"].last_layer.weight[:1]
    images = draws(1, 3, 12, 16).expand(6, -1, -1, -1)
    found = look_at(networks, images, temperature=0.07)
    assert found["rankme"] == pytest.approx(1, abs=1e-3)
    assert found["cls_cosine"] == pytest.approx(1)
    assert found["prototypes_used"] == 1
    assert found["prototypes_duplicated"] == 1
    assert found["row_entropy"] == pytest.approx(dead_level(10), abs=1e-5)


@pytest.mark.parametrize("norm", ["none", "free", "fixed"])
def test_prototypes_of_all_kinds_of_heads(norm):
    networks = teacher()
    head = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, weight_norm=norm)
    head.reset_parameters(torch.Generator().manual_seed(0))
    networks["dino_head"] = head
    found = look_at(networks, draws(4, 3, 12, 16), temperature=0.07)
    expected = duplicate_prototypes(head.last_layer.weight.detach())
    assert found["prototypes_duplicated"] == expected


def test_a_network_of_ours_can_be_looked_at():
    backbone, _ = build_network("vitmicro8")
    networks = nn.ModuleDict({"backbone": backbone})
    found = look_at(networks, draws(3, 3, 32, 32), temperature=0.07)
    assert list(found) == KEYS
    assert all(math.isfinite(value) for value in found.values())


def test_refusals():
    with pytest.raises(ShapeError, match="two images or more"):
        look_at(teacher(), draws(1, 3, 8, 8), temperature=0.07)
    with pytest.raises(NotFiniteError, match="Go back to an earlier checkpoint"):
        look_at(teacher(broken=True), draws(4, 3, 8, 8), temperature=0.07)

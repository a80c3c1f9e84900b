"""Near-duplicates and images of one group get one number; others their own."""

import pytest
import torch

from dino_adapters.pretrain.kin import appearance, connected, kin_of
from dino_adapters.pretrain.losses import koleo_loss


def scenes(count=6, side=48, seed=0):
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=draws)
    return torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)


def kin(images, families):
    return kin_of(torch.stack([appearance(image) for image in images]), families)


def own(count):
    return torch.arange(count)


def test_different_scenes_stand_alone():
    assert kin(scenes(), own(6)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "alter",
    [
        lambda x: x,
        lambda x: 0.8 * x + 0.1,  # exposure
        lambda x: x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
        lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ],
    ids=["same", "exposure", "noise", "blur"],
)
def test_altered_copies_are_kin(alter):
    images = scenes()
    images[4] = alter(images[1:2])[0]
    assert kin(images, own(6)).tolist() == [0, 1, 2, 3, 1, 5]


def test_bytes_and_floats_look_alike():
    for image in scenes():
        found = appearance((image * 255).round().byte())
        torch.testing.assert_close(found, appearance(image), atol=2e-3, rtol=0)


def test_groups_files_and_empty_images_are_kin():
    images = scenes(7)
    images[2], images[5] = 0.3, 0.7  # empty: two colours
    families = torch.tensor([0, 1, 2, 3, 3, 5, 0])
    assert kin(images, families).tolist() == [0, 1, 2, 3, 3, 2, 0]


def test_links_are_followed_to_their_end():
    links = torch.eye(5, dtype=torch.bool)
    for a, b in ((0, 3), (3, 1), (2, 4)):
        links[a, b] = links[b, a] = True
    assert connected(links).tolist() == [0, 0, 2, 0, 2]


def koleo_by_hand(tokens, kin):
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    total = 0.0
    for i in range(len(unit)):
        others = [j for j in range(len(unit)) if kin[j] != kin[i]]
        if others:
            nearest = max(others, key=lambda j: float(unit[i] @ unit[j]))
            total -= float((unit[i] - unit[nearest]).norm().log())
    return total / len(unit)


@pytest.mark.parametrize("kin", [[0, 1, 2, 3, 4], [0, 0, 2, 2, 4], [0, 0, 0, 0, 4], [0] * 5])
def test_koleo_looks_past_kin(kin):
    tokens = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens[1] = tokens[0] + 1e-9
    found = koleo_loss(tokens.requires_grad_(), kin=torch.tensor(kin))
    value = float(found.detach())
    if kin[0] == kin[1]:
        assert value == pytest.approx(koleo_by_hand(tokens.detach(), kin), abs=1e-6)
    else:
        assert value > 5  # they fight each other
    found.backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    if len(set(kin)) == 1:
        assert float(tokens.grad.abs().max()) == 0.0


def test_a_token_that_is_not_finite_is_not_hidden_by_kin():
    tokens = torch.randn(4, 8)
    tokens[2, 0] = float("nan")
    assert koleo_loss(tokens, kin=own(4)).isnan()

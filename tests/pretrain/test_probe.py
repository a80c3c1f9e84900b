"""Looks: the network is left as it was, and queries choose nothing."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dino_adapters.backbones import build_network, load_backbone
from dino_adapters.contracts import (
    RGB,
    BackboneInfo,
    DataError,
    Features,
    Sample,
    UnreadableFileError,
)
from dino_adapters.features import embed, vectors
from dino_adapters.pretrain.labelled import LabelledSet, Squares
from dino_adapters.pretrain.probe import Look, look, read, sizes_for
from dino_adapters.runtime.console import Notices

COUNT, CLASSES, WIDTH, SIDE = 120, 3, 8, 16
INFO = BackboneInfo("planted", "timm", embed_dim=WIDTH, patch_size=8, depth=1, registers=0, size=16)
KEYS = tuple(f"{index:03d}" for index in range(COUNT))


class Colours:
    """Images of one colour each, which is their number: a network can tell them apart."""

    def __init__(self, *, broken=()):
        self.broken, self.reads = set(broken), Counter()
        self.keys = KEYS

    def read(self, key):
        self.reads[key] += 1
        if key in self.broken:
            raise UnreadableFileError(f"{key} is truncated.")
        return Sample(key, np.full((3, SIDE, SIDE), int(key), np.uint8), RGB)

    def digest(self, key):
        return key

    def __len__(self):
        return COUNT

    def __iter__(self):
        return iter(KEYS)


class Planted(nn.Module):
    """A vector for every image and size, looked up by colour."""

    def __init__(self, tables):
        super().__init__()
        self.tables = {size: torch.as_tensor(table) for size, table in tables.items()}
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.seen = Counter()

    def forward(self, images, *, layers=(), norm=True):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()  # what is cached in it cannot be trained on
        size = images.shape[-1]
        red = images[:, 0].mean(dim=(1, 2)) * INFO.std[0] + INFO.mean[0]
        index = (red * 255).round().long()
        self.seen.update((size, int(one)) for one in index)
        x = self.tables[size][index] * self.scale
        return Features(x, x.new_zeros(len(x), 0, WIDTH), x[:, None], (1, 1))


def labelled(source=None, notices=None, **changes):
    """Even numbers, in groups of three, are the gallery."""
    notices = Notices() if notices is None else notices
    source = Colours() if source is None else source
    labels = {key: "abc"[int(key) // 6 % CLASSES] for key in KEYS}
    told = {
        "source": source,
        "gallery": KEYS[::2],
        "queries": KEYS[1::2],
        "labels": labels,
        "groups": {key: f"g{int(key) // 6}-{int(key) % 2}" for key in KEYS},
        "seen": False,
        "squares": Squares(source, notices),  # pyright: ignore[reportArgumentType]
        "workers": 2,
        "max_unreadable": 0.1,
        "notices": notices,
    }
    return LabelledSet(**(told | changes))


def table(seed, apart):
    """Vectors `(COUNT, WIDTH)` whose classes are so far apart."""
    rng = np.random.default_rng(seed)
    codes = np.arange(COUNT) // 6 % CLASSES
    x = rng.normal(size=(COUNT, WIDTH)) + apart * np.eye(CLASSES, WIDTH)[codes]
    return x.astype(np.float32)


def test_the_size_is_the_best_on_the_gallery():
    network = Planted({8: table(0, 0.5), 16: table(1, 4.0), 24: table(2, 1.0)})
    found = look(network, INFO, labelled(), (8, 16, 24))
    assert found.size == 16
    assert found.selection == found.scores[16] == max(found.scores.values())
    assert min(found.knn, found.linear) > 0.9
    assert found.answers.shape == (2, 60)
    assert found.answers.dtype == bool
    assert found.answered.all()
    queries = {int(key) for key in KEYS[1::2]}
    assert {size for size, index in network.seen if index in queries} == {16}


def test_of_equal_sizes_the_smaller_is_taken():
    same = table(1, 3.0)
    found = look(Planted({8: same, 16: same}), INFO, labelled(), (16, 8))
    assert found.size == 8
    assert found.scores[8] == found.scores[16]


def test_another_size_than_the_starts_must_be_shown_to_be_better():
    clear = {8: table(0, 0.5), 16: table(1, 4.0)}
    moved = look(Planted(clear), INFO, labelled(), (8, 16), usual=8)
    assert moved.size == 16
    assert moved.selection == moved.scores[8]  # looks are ranked at one size
    close = {8: table(0, 2.0), 16: table(1, 2.1)}
    free = look(Planted(close), INFO, labelled(), (8, 16))
    other = 24 - free.size
    kept = look(Planted(close), INFO, labelled(), (8, 16), usual=other)
    assert kept.size == other
    assert kept.selection == kept.scores[other] < kept.scores[free.size]
    # A size that is not among them asks for nothing.
    assert look(Planted(close), INFO, labelled(), (8, 16), usual=24).size == free.size


def test_queries_choose_nothing():
    """Other labels, and other vectors, of the queries change their answers and nothing else."""
    tables = {8: table(0, 1.0), 16: table(1, 1.2)}
    first = look(Planted(tables), INFO, labelled(), (8, 16))
    turned = {key: "bca"["abc".index(name)] for key, name in labelled().labels.items()}
    mixed = {key: labelled().labels[key] if int(key) % 2 == 0 else turned[key] for key in KEYS}
    second = look(Planted(tables), INFO, labelled(labels=mixed), (8, 16))
    others = {size: x.copy() for size, x in tables.items()}
    for x in others.values():
        x[1::2] = table(9, 5.0)[1::2]
    third = look(Planted(others), INFO, labelled(), (8, 16))
    for other in (second, third):
        assert (other.size, other.selection, other.strength) == (
            first.size,
            first.selection,
            first.strength,
        )
        assert other.scores == first.scores
        assert not np.array_equal(other.answers, first.answers)


def test_a_look_is_repeated_to_the_bit_and_survives_json():
    network, images = Planted({8: table(0, 1.0), 16: table(1, 1.0)}), labelled()
    first = look(network, INFO, images, (8, 16))
    for other in (
        look(network, INFO, images, (8, 16)),
        look(network, INFO, labelled(workers=0), (8, 16), batch_size=7),
        Look.from_json(json.loads(json.dumps(first.as_json(), allow_nan=False))),
    ):
        assert other.as_json() == first.as_json()
        np.testing.assert_array_equal(other.answers, first.answers)
        np.testing.assert_array_equal(other.answered, first.answered)


def test_files_are_decoded_once_for_all_sizes_and_looks():
    source = Colours()
    network, images = Planted({8: table(0, 2.0), 16: table(0, 2.0)}), labelled(source)
    for _ in range(3):
        look(network, INFO, images, (8, 16))
    assert set(source.reads.values()) == {1}
    assert len(source.reads) == COUNT


def test_the_network_is_left_as_it_was():
    network = Planted({16: table(0, 2.0)})
    network.train()
    network.norm.eval()  # as frozen running statistics are
    look(network, INFO, labelled(), (16,))
    assert network.training
    assert not network.norm.training
    assert network.scale.requires_grad
    with pytest.raises(KeyError):
        look(network, INFO, labelled(), (24,))
    assert network.training


def test_a_network_learns_on_after_a_look():
    """What it may have cached in a look must serve the next step."""
    architecture = {"embed_dim": 24, "num_heads": 2, "depth": 1}
    network, info = build_network("vitmicro8", architecture=architecture)
    look(network, info, labelled(), (16,))
    images = torch.randn(2, 3, 16, 16)
    network.train()(images).cls.sum().backward()
    assert any(p.grad is not None for p in network.parameters())


def test_vectors_are_those_of_embed(tmp_path):
    architecture = {"embed_dim": 24, "num_heads": 2, "depth": 1}
    backbone = load_backbone("vitmicro8", architecture=architecture)
    source = Colours()
    store = embed(backbone, source, tmp_path, size=SIDE, keys=KEYS[:9], quiet=True)
    found = read(backbone.network, backbone.info, labelled(source), KEYS[:9], (SIDE,), batch_size=4)
    assert found.keys == KEYS[:9]
    expected = vectors(store.read(KEYS[:9]), "cls_mean")
    np.testing.assert_allclose(found.vectors[SIDE], expected, atol=1e-5)


def test_unreadable_files_are_left_out_and_said():
    notices, source = Notices(), Colours(broken=("002", "007", "011"))
    network, images = Planted({16: table(0, 6.0)}), labelled(source, notices)
    found = look(network, INFO, images, (16,))
    again = look(network, INFO, images, (16,))
    assert found.as_json() == again.as_json()
    lost = [index for index, there in enumerate(found.answered) if not there]
    assert [KEYS[1::2][index] for index in lost] == ["007", "011"]
    assert not found.answers[:, lost].any()
    assert found.knn == found.linear == 1.0  # of those that could be asked
    assert notices.counts["unreadable labelled images left out"] == 3
    assert source.reads["007"] == 1


def test_too_many_unreadable_files_are_refused():
    images = labelled(Colours(broken=KEYS[:14]), max_unreadable=0.05)
    with pytest.raises(DataError, match="7 of 120 labelled images cannot be read"):
        look(Planted({16: table(0, 2.0)}), INFO, images, (16,))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_diverged_network_is_all_wrong_and_stops_nothing(value):
    notices = Notices()
    x = table(0, 4.0)
    x[4] = value
    broken = np.full_like(x, value)
    found = look(Planted({16: broken}), INFO, labelled(notices=notices), (16,))
    if not np.isfinite(value):
        assert (found.selection, found.knn, found.linear) == (0.0, 0.0, 0.0)
        assert notices.counts["looks with vectors that are not finite, counted as wrong"] == 1
    assert found.answered.all()
    json.dumps(found.as_json(), allow_nan=False)
    # The size at which it still works is taken.
    fine = look(Planted({8: table(0, 4.0), 16: broken}), INFO, labelled(), (8, 16))
    assert fine.size == 8
    assert fine.knn > 0.9


def test_queries_without_finite_vectors_are_wrong():
    x = table(0, 6.0)
    x[7] = np.nan
    found = look(Planted({16: x}), INFO, labelled(), (16,))
    assert not found.answers[:, 3].any()
    assert found.answers.mean() == pytest.approx(59 / 60)
    assert found.answered.all()


@pytest.mark.parametrize(
    ("patch", "size", "training", "crop", "side", "expected"),
    [
        (16, 224, {}, 96, 256, (96, 128, 224, 256)),
        (8, 48, {"weights": "random"}, 48, 64, (48, 64)),
        (14, 518, {}, 224, 1000, (224, 252)),  # wishes above 256 px are cut
        (16, 512, {}, 512, 640, (512,)),  # training reads larger images itself
        (32, 224, {}, 96, 100, (96, 128, 224)),
        (16, 224, {"weights": "random"}, 96, 20, (16, 96, 128)),
        (16, 224, {"weights": "random"}, 96, 5, (16, 96, 128)),
    ],
)
def test_sizes_worth_trying(patch, size, training, crop, side, expected):
    info = replace(INFO, patch_size=patch, size=size, training=training)
    assert sizes_for(info, crop, side) == expected

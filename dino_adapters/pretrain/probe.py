"""k-NN and linear probe of a network while it trains, in memory.

Only the gallery chooses: reading size, strength of the linear probe, best look and early stop all
follow from its own labels, whole groups being left out. Queries are answered and nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_adapters.backbones.frozen import at_rest
from dino_adapters.contracts import BackboneInfo, DataError
from dino_adapters.data.resize import unit_range
from dino_adapters.features.pool import vectors
from dino_adapters.features.store import StoredFeatures
from dino_adapters.pretrain.answers import (
    findable,
    held_out_knn,
    held_out_linear,
    knn,
    linear_probe,
    mean_recall,
    shown_better,
)
from dino_adapters.pretrain.labelled import LabelledSet

MOST_SIDE = 256
"""Larger images than this take minutes on a CPU; read only where training does so, too."""
BATCH = 32


@dataclass(frozen=True, eq=False)
class Look:
    """What the labelled images say of a network at one moment.

    Attributes:
        size: Side in pixels that it was read at, chosen on the gallery.
        selection: Balanced accuracy within the gallery, k-NN and linear probe averaged, at the
            usual size, whatever `size` is: what the best look and an early stop are chosen by.
            Without a usual size, at that one.
        scores: The same of every size tried.
        strength: C of the linear probe, chosen on the gallery.
        answers: bool `(2, queries)`: whether k-NN and linear probe were right; False where a file
            could not be read.
        answered: bool `(queries,)`: whether the file could be read.
        held_out: bool `(2, gallery)`: whether either was right about an image of the gallery, its
            own group being left out; of `size`.
        asked: bool `(gallery,)`: whether it could be asked for.
        knn: Balanced accuracy of k-NN on the queries.
        linear: The same of the linear probe.
        labelled: Digest of the labelled set; looks at other sets cannot be compared.
    """

    size: int
    selection: float
    scores: Mapping[int, float]
    strength: float
    answers: np.ndarray
    answered: np.ndarray
    held_out: np.ndarray
    asked: np.ndarray
    knn: float
    linear: float
    labelled: str

    def as_json(self) -> dict[str, Any]:
        """JSON-safe; `Look.from_json` reads it."""
        return {
            "size": self.size,
            "selection": self.selection,
            "scores": {str(size): score for size, score in self.scores.items()},
            "strength": self.strength,
            "answers": [_marks(row) for row in self.answers],
            "answered": _marks(self.answered),
            "held_out": [_marks(row) for row in self.held_out],
            "asked": _marks(self.asked),
            "knn": self.knn,
            "linear": self.linear,
            "labelled": self.labelled,
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Look:
        """The look that `as_json` wrote."""
        told = dict(held)
        told["scores"] = {int(size): score for size, score in held["scores"].items()}
        for name in ("answers", "held_out"):
            told[name] = np.stack([_flags(row) for row in held[name]])
        for name in ("answered", "asked"):
            told[name] = _flags(held[name])
        return cls(**told)


@dataclass(frozen=True, eq=False)
class Read:
    """Vectors of those images that could be read: size -> float32 `(n, D)`, in order of `keys`."""

    keys: tuple[str, ...]
    vectors: Mapping[int, np.ndarray]


def sizes_for(info: BackboneInfo, crop_size: int, side: int) -> tuple[int, ...]:
    """Sizes worth reading a network at, the same before and after training.

    The crops', 1.4 times that, the one that training reads images at, and what the network was made
    for, as multiples of a patch. None above 256 px, or the crops' size where that is larger: such
    wishes are cut.

    Args:
        info: Card of the network that the run starts from.
        crop_size: Side of its global crops in pixels.
        side: Shorter side in pixels at which training reads images.
    """
    wanted = [float(crop_size), 1.4 * crop_size, float(side)]
    if info.training.get("weights") != "random":  # those were made for no size
        wanted.append(float(info.size))
    patch, most = info.patch_size, max(MOST_SIDE, crop_size)
    return tuple(sorted({max(1, min(round(w / patch), most // patch)) * patch for w in wanted}))


def look(
    network: nn.Module,
    info: BackboneInfo,
    labelled: LabelledSet,
    sizes: Sequence[int],
    *,
    usual: int | None = None,
    batch_size: int = BATCH,
) -> Look:
    """Reads the labelled images and asks both probes.

    The gallery is read at every size, the queries only at the one that suits the gallery best
    (equal scores: the smaller), or at the usual one, where the best is not shown to be better: the
    best of several sizes is partly chance, and the change of size would look like one of the
    network. Queries whose vectors are not finite count as wrong answers; one such vector in the
    gallery makes all answers at that size wrong.

    Args:
        network: In any mode; it is left as it was. Weights spread over devices need this call on
            each of them.
        info: Its card: bands, normalisation, family, patch.
        labelled: The images.
        sizes: Sides in pixels, multiples of the patch.
        usual: That of them which the start is read at; None: there is nothing to compare with.
        batch_size: Images a pass.

    Raises:
        DataError: more files than `max_unreadable` allows cannot be read.
    """
    gallery = read(network, info, labelled, labelled.gallery, sizes, batch_size=batch_size)
    classes, groups = labelled.labels_of(gallery.keys), labelled.groups_of(gallery.keys)
    can_be_asked = findable(classes, groups)
    held_out, scores = {}, {}
    for size, x in gallery.vectors.items():
        held_out[size] = np.zeros((2, len(x)), dtype=bool)
        if np.isfinite(x).all():
            # Both probes, as in the verdict: one alone, of some hundred images, picks by chance.
            held_out[size][0] = held_out_knn(x, classes, groups)
            held_out[size][1] = held_out_linear(x, classes, groups, labelled.notices)
        else:
            labelled.notices.add("looks with vectors that are not finite, counted as wrong")
        known = classes[can_be_asked]
        scores[size] = float(
            np.mean([mean_recall(row[can_be_asked], known) for row in held_out[size]])
        )
    ranked = size = max(scores, key=lambda one: (scores[one], -one))
    if usual is not None and usual in scores:
        ranked = usual
        best, other = (held_out[one][:, can_be_asked] for one in (size, usual))
        if not shown_better(best, other, classes[can_be_asked], groups[can_be_asked]):
            size = usual
    asked = read(network, info, labelled, labelled.queries, (size,), batch_size=batch_size)
    truth, bank, x = labelled.labels_of(asked.keys), gallery.vectors[size], asked.vectors[size]
    right, strength = np.zeros((2, len(truth)), dtype=bool), 0.0
    if np.isfinite(bank).all():
        finite = np.isfinite(x).all(axis=1)
        right[0, finite] = knn(bank, classes, x[finite]) == truth[finite]
        said, strength = linear_probe(bank, classes, groups, x[finite], labelled.notices)
        right[1, finite] = said == truth[finite]
    answered = np.isin(np.array(labelled.queries), np.array(asked.keys))
    answers = np.zeros((2, len(answered)), dtype=bool)
    answers[:, answered] = right
    there = np.isin(np.array(labelled.gallery), np.array(gallery.keys))
    asked_for, chosen_by = np.zeros(len(there), dtype=bool), np.zeros((2, len(there)), dtype=bool)
    asked_for[there], chosen_by[:, there] = can_be_asked, held_out[size]
    knn_score, linear_score = (mean_recall(row, truth) for row in right)
    return Look(
        size=size,
        selection=scores[ranked],
        scores=scores,
        strength=strength,
        answers=answers,
        answered=answered,
        held_out=chosen_by,
        asked=asked_for,
        knn=knn_score,
        linear=linear_score,
        labelled=labelled.digest,
    )


def read(
    network: nn.Module,
    info: BackboneInfo,
    labelled: LabelledSet,
    keys: Sequence[str],
    sizes: Sequence[int],
    *,
    batch_size: int = BATCH,
) -> Read:
    """Vectors of some images at some sizes; each file is decoded once for all of them.

    A vector is class token and mean patch (`cls_mean`) of a ViT, the pooled map of other networks.

    Raises:
        DataError: more files than `max_unreadable` allows cannot be read.
    """
    device = next(network.parameters()).device
    mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
    there: list[str] = []
    rows: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    with at_rest(network), ThreadPoolExecutor(max(labelled.workers, 1)) as pool:
        for batch in _batches(pool, info, labelled, keys, sizes, batch_size):
            there += [key for key, _ in batch]
            for size in sizes:
                images = torch.stack([unit_range(squares[size]) for _, squares in batch])
                images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
                features = network(images.to(device))
                stored = StoredFeatures(
                    keys=(),
                    cls=features.cls.float().cpu().numpy(),
                    mean=features.patches.float().mean(dim=1).cpu().numpy(),
                    patches=None,
                    grid=features.grid,
                )
                with np.errstate(invalid="ignore", over="ignore"):  # a diverged network is judged
                    found = vectors(stored, "cls_mean" if info.family == "vit" else "cls")
                rows[size].append(found)
    return Read(tuple(there), {size: np.concatenate(parts) for size, parts in rows.items()})


def _batches(
    pool: ThreadPoolExecutor,
    info: BackboneInfo,
    labelled: LabelledSet,
    keys: Sequence[str],
    sizes: Sequence[int],
    count: int,
) -> Iterator[list[tuple[str, dict[int, Tensor]]]]:
    """Keys with their squares, unreadable ones left out, one batch being read ahead."""
    waiting: list[tuple[str, Future[dict[int, Tensor] | None]]] = []
    for start in range(0, len(keys) + count, count):
        chunk = keys[start : start + count]
        ahead = [(key, pool.submit(labelled.squares.get, key, info, sizes)) for key in chunk]
        found = [(key, future.result()) for key, future in waiting]
        batch = [(key, squares) for key, squares in found if squares is not None]
        _check_readable(labelled)
        waiting = ahead
        if batch:
            yield batch


def _check_readable(labelled: LabelledSet) -> None:
    bad, total = labelled.squares.unreadable, len(labelled.gallery) + len(labelled.queries)
    if len(bad) > labelled.max_unreadable * total:
        raise DataError(
            f"{len(bad)} of {total} labelled images cannot be read (first: '{min(bad)}'), more "
            f"than data.max_unreadable={labelled.max_unreadable:g} allows. Mend or remove them, or "
            "raise that limit."
        )


def _marks(flags: np.ndarray) -> str:
    return "".join("1" if flag else "0" for flag in flags)


def _flags(marks: str) -> np.ndarray:
    return np.array([mark == "1" for mark in marks], dtype=bool)

"""Kind `masks`: block masks with every draw replayed, and the order of a collated batch."""

from collections import deque
from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import Tensor

from dino_adapters.pretrain import masks
from dino_adapters.pretrain.masks import block_masks, mask_weights, reference_block_limit

from ..case import Case, Settings

EXACT = 1e-7
"""The case allows rounding only."""


class ReplayedMaskDraws:
    """`masks.MaskDraws` that pops stored draws, and insists on being asked the same."""

    def __init__(self, draws: Sequence[list[Any]]) -> None:
        self._left = deque(draws)

    def uniform(self, a: float, b: float) -> float:
        stored = self._next("uniform")
        assert (a, b) == tuple(stored[:2])
        return stored[2]

    def randint(self, a: int, b: int) -> int:
        stored = self._next("randint")
        assert [a, b] == stored[:2]
        return stored[2]

    def sample(self, population: Sequence[int], k: int) -> list[int]:
        stored = self._next("choice_without_replacement")
        assert [list(population), k] == stored[:2]
        return stored[2]

    def shuffle(self, x: list[Tensor]) -> None:
        (source,) = self._next("shuffle_source_index")
        assert len(source) == len(x)
        x[:] = [x[index] for index in source]

    def _next(self, kind: str) -> list[Any]:
        assert self._left, f"a {kind} was asked for after the last stored draw"
        stored, *rest = self._left.popleft()
        assert stored == kind, f"a {kind} was asked for, a {stored} is stored"
        return rest

    def finish(self) -> None:
        """Fails if fewer draws were asked for than are stored."""
        assert not self._left, f"{len(self._left)} draws were not asked for"


def read(case: Case) -> None:
    for spec in case.settings["config"]["specs"]:
        _check_masks(case, spec)
        _check_order(case, spec)


def _check_masks(case: Case, spec: Settings) -> None:
    place, side = f"out/{spec['index']}", spec["grid"]
    size, patch = spec["img_size"], spec["patch_size"]
    assert side == size // patch
    assert side**2 == spec["n_tokens"]
    assert spec["min_num_patches"] == masks.LEAST_BLOCK
    aspects = spec["min_aspect"], spec["max_aspect"]
    assert [log(aspect) for aspect in aspects] == [log(aspect) for aspect in masks.ASPECT]
    most = reference_block_limit(size, patch)
    assert most == spec["max_num_patches"]
    # A student among several gets masks for its share of the images alone.
    images = spec.get("local_batch_size", spec["B"])
    draws = ReplayedMaskDraws(spec["draws"])
    low, high = spec["ratio"]
    found = block_masks(
        2 * images,
        (side, side),
        draws,
        probability=spec["prob"],
        ratio=(low, high),
        most=most,
        shift=spec.get("shift", False),
    )
    draws.finish()
    assert found.sum(dim=1).tolist() == spec["mask_counts"]
    case.check(f"{place}/collated_masks", found)
    case.check(f"{place}/mask_indices_list", found.flatten().nonzero().flatten())
    case.check(f"{place}/masks_weight", mask_weights(found), bound=EXACT)
    case.check(f"{place}/n_masked_patches", found.sum().view(1))
    # The counts alone set their buffer's size; ours needs none.
    case.check(f"{place}/upperbound", found.sum())


def _check_order(case: Case, spec: Settings) -> None:
    """A view of all images, then the next one: `view * B + image`, as in our `MultiCrop`."""
    place, images = f"out/{spec['index']}", torch.arange(spec["B"])
    globals_ = torch.cat([100 * view + images for view in range(2)])
    locals_ = torch.cat([1000 + 100 * view + images for view in range(spec["n_local"])])
    expected = {"collated_global_crops": globals_, "collated_local_crops": locals_}
    if spec.get("gram", False):
        expected["collated_gram_teacher_crops"] = -(globals_ + 1)
    for name, numbers in expected.items():
        shape = case.tensor(f"{place}/{name}").shape
        filled = numbers.to(case.dtype).view(-1, 1, 1, 1).expand(-1, *shape[1:])
        case.check(f"{place}/{name}", filled, bound=EXACT)

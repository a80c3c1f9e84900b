"""From three bands to N: filters of the first convolution spread over other bands.

Spreading is a start for training, never a shortcut for evaluation: of 17 published comparisons of
frozen RGB networks with spread filters, 16 lost against plain RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from dino_adapters.contracts import Band, RecipeError, UnitsError
from dino_adapters.runtime.console import Notices

Spread = Literal["by_name", "mean", "repeat", "zero"]
SPREADS: tuple[str, ...] = get_args(Spread)

CENTRE_MEAN, CENTRE_STD = 0.5, 0.25
"""Statistics of a band that nobody measured: the centre of its mapped range, a quarter of it."""

UNTRAINED = (
    "The filters of some bands were spread from others and never trained. Frozen networks lose by "
    "that in 16 of 17 published comparisons (torchgeo-bench: mean -3.9 points, worst -21.1). Bands "
    "named red, green and blue (data.bands) keep theirs; train the others, or leave them out"
)


def spread_filters(
    weight: Tensor, have: Sequence[str], want: Sequence[str], how: Spread = "by_name"
) -> Tensor:
    """Filters for the bands `want`, made of those for the bands `have`.

    `by_name`: a band of a known name keeps its filter, others get the mean filter, and all are
    scaled by `len(have) / len(want)`, so that activations of correlated bands keep their size.
    `mean`: the mean filter for every band, scaled alike; for when RGB is absent (radar, thermal).
    `repeat`: the known filters in turn (R, G, B, R, …), scaled alike; what timm does.
    `zero`: known bands keep their filters unscaled, others start at 0: the features are those of
    the RGB network until training changes them.
    A single wanted band gets the sum of all filters (`zero` excepted), which equals copying it into
    every channel.

    Args:
        weight: `(D, C, k, k)`, C = len(have).
        have: Names of the bands that the filters are for.
        want: Names of the bands to come.
        how: The rule above.

    Returns:
        `(D, len(want), k, k)`, same dtype and device.

    Raises:
        RecipeError: unknown rule, repeated names, or `zero` without all known bands.
    """
    if how not in SPREADS:
        raise RecipeError(f"spread is '{how}'. Use one of {', '.join(SPREADS)}.")
    if not want or len(set(want)) != len(want):
        raise RecipeError(f"The bands are {list(want)}. Name every band once, and at least one.")
    if tuple(want) == tuple(have):
        return weight.clone()
    source = weight.detach().double()
    index = {name: position for position, name in enumerate(have)}
    scale = len(have) / len(want)
    if how == "zero":
        absent = [name for name in have if name not in want]
        if absent:
            raise RecipeError(
                f"spread=zero keeps the network's own bands, and {', '.join(absent)} are absent "
                f"from {', '.join(want)}. Use mean or by_name."
            )
        columns = [
            source[:, index[name]] if name in index else torch.zeros_like(source[:, 0])
            for name in want
        ]
        scale = 1.0
    elif len(want) == 1:
        columns, scale = [source.sum(1)], 1.0
    elif how == "mean":
        columns = [source.mean(1)] * len(want)
    elif how == "repeat":
        columns = [source[:, position % len(have)] for position in range(len(want))]
    else:
        average = source.mean(1)
        columns = [source[:, index[name]] if name in index else average for name in want]
        if set(want) == set(have):  # another order only
            scale = 1.0
    return (torch.stack(columns, 1) * scale).to(weight.dtype)


def untrained_names(have: Sequence[str], want: Sequence[str], how: Spread) -> tuple[str, ...]:
    """Bands whose filter is that of other bands.

    A single band is none of them: the network acts as on a grey image, which it has seen.
    """
    if len(want) == 1 or tuple(want) == tuple(have):
        return ()
    if how == "mean":
        return tuple(want)
    if how == "repeat":
        return tuple(name for i, name in enumerate(want) if name != have[i % len(have)])
    return tuple(name for name in want if name not in have)


def band_statistics(
    have: Sequence[Band],
    want: Sequence[Band],
    known: tuple[Sequence[float], Sequence[float]],
    given: tuple[Sequence[float] | None, Sequence[float] | None],
    notices: Notices,
    trained: bool = False,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per wanted band, of values already mapped to 0..1.

    What is given counts. A band that the network knows by name keeps the network's numbers. Any
    other band gets the centre of its mapped range (0.5) and a quarter of it (0.25), and a notice
    says so; nothing is borrowed from another band.

    Args:
        have: Bands that the network knows.
        want: Bands to come.
        known: Mean and std per band of `have`.
        given: Mean and std per band of `want`, or None.
        notices: Told of bands without measured numbers.
        trained: Whether the numbers belong to trained weights, so that replacing them is told.

    Raises:
        UnitsError: a length is wrong, or a deviation is not positive.
    """
    index = {band.name: position for position, band in enumerate(have)}
    unmeasured: set[str] = set()
    found: list[tuple[float, ...]] = []
    for numbers, chosen, default in zip(known, given, (CENTRE_MEAN, CENTRE_STD), strict=True):
        if chosen is not None:
            if len(chosen) != len(want):
                raise UnitsError(
                    f"mean or std holds {len(chosen)} numbers for {len(want)} bands "
                    f"({', '.join(band.name for band in want)}). Give one per band."
                )
            found.append(tuple(float(number) for number in chosen))
            continue
        row = []
        for band in want:
            if band.name in index:
                row.append(float(numbers[index[band.name]]))
            else:
                row.append(default)
                unmeasured.add(band.name)
        found.append(tuple(row))
    mean, std = found
    replaced = [
        band.name
        for position, band in enumerate(want)
        if band.name in index
        and not all(
            math.isclose(numbers[index[band.name]], row[position], rel_tol=1e-3)
            for numbers, row in zip(known, found, strict=True)
        )
    ]
    if trained and replaced:
        notices.add(
            "Mean and std that the trained weights knew were replaced by other ones",
            ", ".join(replaced),
        )
    if any(not deviation > 0 for deviation in std):
        raise UnitsError(f"std is {std}. Every band needs a number above 0.")
    if unmeasured:
        names = ", ".join(band.name for band in want if band.name in unmeasured)
        notices.add(
            "Bands without given mean and std use the centre (0.5) and a quarter (0.25) of their "
            "mapped range; measure them and give mean= and std=",
            names,
        )
    return mean, std


def check_bands(bands: Sequence[Band]) -> tuple[Band, ...]:
    """The bands as a tuple.

    Raises:
        RecipeError: something else than `Band` is among them; a bare name has no value range.
    """
    wrong = [band for band in bands if not isinstance(band, Band)]
    if wrong or not bands:
        held = f"holds {wrong[0]!r}" if wrong else "is empty"
        raise RecipeError(
            f"bands {held}. Give dino_adapters.Band objects: a name alone says nothing of the "
            "value range."
        )
    return tuple(bands)

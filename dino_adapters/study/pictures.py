"""Pictures of what a network sees: PCA colours, attention maps, nearest neighbours.

Each figure is a grid of small images with words under them, as HTML: it wraps on a phone, and its
text can be searched. Photographs are JPEG and maps are PNG, both as `data:` addresses.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dino_adapters.contracts import DataError, Figure, ShapeError

THUMBNAIL = 112
# Black, violet, orange, pale yellow: lightness rises throughout, so it also reads in grey.
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """One query image and the images a network finds nearest to it, nearest first.

    Each image is `(picture (H, W, 3) uint8, label)`; without labels use an empty string.
    """

    query: tuple[np.ndarray, str]
    found: tuple[tuple[np.ndarray, str], ...]


def pca_pictures(
    images: Sequence[np.ndarray], tokens: Mapping[str, np.ndarray], *, title: str | None = None
) -> Figure:
    """The three strongest directions of the patch tokens as red, green and blue.

    One projection for all images of a network, so that equal colours mean equal content across
    images; between networks colours mean nothing.

    Args:
        images: n pictures `(H, W, 3)` uint8.
        tokens: Network -> `(n, h, w, D)` patch tokens of these pictures.
        title: Sentence above the picture; None writes one.

    Raises:
        ShapeError: the tokens do not fit the pictures.
    """
    lines = [_line("image", [_photo(image, "") for image in images])]
    for name, values in tokens.items():
        if values.ndim != 4 or len(values) != len(images):
            raise ShapeError(
                f"The tokens of '{name}' have shape {values.shape}; expected ({len(images)}, h, w, "
                "D), a map for each picture."
            )
        maps = pca_colours(values)
        lines.append(_line(name, [_map(one, f"PCA of patch tokens, {name}") for one in maps]))
    return Figure(
        title or "What the patches have in common, as colours.",
        "Principal components 1 to 3 of the patch tokens, fitted on all pictures of a row "
        "together. Same colour in a row: similar tokens.",
        _grid(lines),
    )


def attention_maps(
    images: Sequence[np.ndarray], maps: Mapping[str, np.ndarray], *, title: str | None = None
) -> Figure:
    """Where the class token looks, as heat over the picture.

    Args:
        images: n pictures `(H, W, 3)` uint8.
        maps: Network -> `(n, h, w)` attention, e.g. the mean over heads; any scale.
        title: Sentence above the picture; None writes one.

    Raises:
        ShapeError: the maps do not fit the pictures.
    """
    lines = [_line("image", [_photo(image, "") for image in images])]
    for name, values in maps.items():
        if values.ndim != 3 or len(values) != len(images):
            raise ShapeError(
                f"The maps of '{name}' have shape {values.shape}; expected ({len(images)}, h, w), "
                "one for each picture. Average over heads first."
            )
        cells = [
            _photo(_overlay(image, one), f"attention, {name}")
            for image, one in zip(images, values, strict=True)
        ]
        lines.append(_line(name, cells))
    return Figure(
        title or "Where the class token looks.",
        "Attention of the class token in the last block, mean over heads, scaled in each picture "
        "by itself. Bright: much attention.",
        _grid(lines),
    )


def neighbour_strips(
    strips: Mapping[str, Sequence[Neighbours]], *, title: str | None = None
) -> Figure:
    """The images each network finds nearest to the same few queries.

    Args:
        strips: Network -> one `Neighbours` for each query.
        title: Sentence above the picture; None counts how many neighbours share the query's class.

    Raises:
        DataError: there is no query.
    """
    if not any(strips.values()):
        raise DataError("There is no query image, so there are no neighbours to show.")
    lines, shares = [], []
    for name, queries in strips.items():
        pairs = [(q.query[1], label) for q in queries for _, label in q.found if q.query[1]]
        if pairs:
            shares.append(f"{name} {sum(a == b for a, b in pairs)} of {len(pairs)}")
        for query in queries:
            cells = [
                _photo(
                    query.query[0],
                    f"query: {query.query[1]}".rstrip(": "),
                    "query",
                    words_shown=True,
                )
            ]
            for picture, label in query.found:
                same = bool(label) and label == query.query[1]
                # The class is marked by a sign and a border, not by colour alone.
                mark = "" if not label else ("✓ " if same else "✗ ")
                kind = "" if not label else ("same" if same else "other")
                cells.append(_photo(picture, f"{mark}{label}", kind, words_shown=True))
            lines.append(_line(name, cells))
    told = f"Neighbours of the query's own class: {'; '.join(shares)}." if shares else None
    return Figure(
        title or told or "The nearest images by cosine similarity.",
        "First in each line: the query. Then the nearest images, nearest first. ✓: the same class.",
        _grid(lines),
    )


def pca_colours(tokens: np.ndarray) -> np.ndarray:
    """`(n, h, w, D)` tokens -> uint8 `(n, h, w, 3)`, one projection for all.

    Each component is stretched between its 2nd and 98th percentile. Signs are fixed (the largest
    weight is positive), since a singular vector's sign is arbitrary. A token map that does not
    vary gives mid-grey.
    """
    n, h, w, d = tokens.shape
    flat = tokens.reshape(-1, d).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    # The D x D covariance: token counts are far larger than D.
    values, vectors = np.linalg.eigh(flat.T @ flat)
    chosen = vectors[:, ::-1][:, :3]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(chosen.shape[1])])
    # Directions that hold only rounding noise would be stretched into confetti.
    chosen = chosen * (values[::-1][:3] > 1e-10 * max(values[-1], 1e-30))
    seen = flat @ chosen
    low, high = np.percentile(seen, (2, 98), axis=0)
    span = high - low
    unit = np.divide(seen - low, span, out=np.full_like(seen, 0.5), where=span > 0)
    colours = np.full((len(unit), 3), 0.5)
    colours[:, : unit.shape[1]] = unit.clip(0, 1)
    return (colours.reshape(n, h, w, 3) * 255).round().astype(np.uint8)


def _overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Heat colours over a dimmed grey picture of thumbnail size."""
    picture = Image.fromarray(_rgb(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    grey = np.asarray(picture.convert("L"), float)[..., None]
    heat = attention.astype(np.float64)
    span = heat.max() - heat.min()
    heat = (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)
    scaled = Image.fromarray(heat.astype(np.float32)).resize(
        picture.size, Image.Resampling.BILINEAR
    )
    at = np.asarray(scaled, float).clip(0, 1) * (len(_HEAT) - 1)
    below = np.minimum(at.astype(int), len(_HEAT) - 2)
    part = (at - below)[..., None]
    colour = _HEAT[below] * (1 - part) + _HEAT[below + 1] * part
    return (0.4 * grey + 0.6 * colour).round().astype(np.uint8)


def _rgb(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ShapeError(
            f"A picture has shape {image.shape} and dtype {image.dtype}; expected (H, W, 3) uint8. "
            "Choose three bands to show and scale them to 0..255 first."
        )
    return np.ascontiguousarray(image)


def _photo(image: np.ndarray, words: str, kind: str = "", *, words_shown: bool = False) -> str:
    picture = Image.fromarray(_rgb(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return _cell(picture, "jpeg", words, kind, words_shown=words_shown)


def _map(colours: np.ndarray, words: str) -> str:
    # One pixel a patch: the page enlarges it without smoothing, so patches stay visible.
    return _cell(Image.fromarray(colours), "png", words, "map")


def _cell(
    picture: Image.Image, kind: str, words: str, css: str, *, words_shown: bool = False
) -> str:
    written = io.BytesIO()
    picture.save(
        written, kind.upper(), **({"quality": 88} if kind == "jpeg" else {"optimize": True})
    )
    data = base64.b64encode(written.getvalue()).decode("ascii")
    said = html.escape(words)
    under = f"<span>{said}</span>" if words_shown else ""
    return (
        f'<div class="cell {css}"><img alt="{said}" src="data:image/{kind};base64,{data}">'
        f"{under}</div>"
    )


def _line(name: str, cells: Sequence[str]) -> str:
    return (
        f'<div class="line"><div class="name">{html.escape(name)}</div>'
        f'<div class="cells">{"".join(cells)}</div></div>'
    )


def _grid(lines: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(lines)}</div>'

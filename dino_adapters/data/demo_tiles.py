"""A small labelled data set from photographs inside installed libraries [scikit-image, optional].

No download. A class is one photograph; the parts of the split are separate strips of it, so that
no test tile shares a pixel with training. It shows that everything works, and what labels are
worth; it says nothing about real data.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dino_adapters.contracts import DataError
from dino_adapters.data.splits import Split, write_split
from dino_adapters.runtime.files import file_digest, json_digest, write_json, write_text
from dino_adapters.runtime.lookup import need

# Photographs with room for ten test tiles, six for validation and more for training. Nothing is
# left out for its looks: tiles of empty sky or of the black around a retina stay in.
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cell": "skimage/data/cell.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
VERSION = 1
TEST_TILES, VAL_TILES = 10, 6
LONGEST = 4
"""Tiles that a training strip is long at most, lest one photograph outweighs the others."""
GAP = 8
"""Pixels left out between two strips."""
LARGE = 720
"""Photographs whose shorter side is longer than this are halved: their tiles would be bare."""
MANIFEST, LABELS, SPLIT = "manifest.json", "labels.csv", "split.json"


@dataclass(frozen=True, slots=True)
class Tile:
    """Where a tile is cut from: a square of pixels of one photograph.

    Attributes:
        label: Name of the photograph.
        part: `train`, `val` or `test`.
        group: Block of place, about two tiles wide, within the part.
        left: First column.
        top: First row.
        size: Side in pixels.
    """

    label: str
    part: str
    group: str
    left: int
    top: int
    size: int

    @property
    def key(self) -> str:
        """Path of its file below the data folder."""
        return f"{self.label}/{self.label}_{self.top:04d}_{self.left:04d}.png"


def make_tiles(folder: Path, *, tile: int = 80) -> Path:
    """Cuts the photographs into a folder of RGB tiles with `labels.csv` and `split.json`.

    Training tiles overlap each other (unlabelled images are what pretraining needs); those of
    validation and test overlap nothing. A second call finds everything in place and returns.

    Args:
        folder: Where to put them; absent, empty, or made by an earlier call.
        tile: Side of a tile in pixels.

    Returns:
        The folder.

    Raises:
        MissingLibraryError: scikit-image is absent.
        DataError: the folder holds something else, or tiles this large leave too few classes.
    """
    files = _files()
    sources = {name: file_digest(path) for name, path in files.items()}
    digest = json_digest({"version": VERSION, "tile": tile, "photographs": sources})
    if _is_made(folder, digest):
        return folder
    photographs = {name: _open(path) for name, path in files.items()}
    tiles = [
        made
        for name, image in photographs.items()
        for made in plan_tiles(name, image.width, image.height, tile)
    ]
    if len({made.label for made in tiles}) < 2:
        raise DataError(
            f"Tiles of {tile} pixels leave fewer than two photographs with room for a test. "
            "Choose smaller ones, such as 80."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(building, tiles, photographs, digest)
        building.chmod(0o777 & ~_umask())
        _clear(folder)
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def plan_tiles(label: str, width: int, height: int, tile: int) -> tuple[Tile, ...]:
    """Tiles of a photograph; none where it is too small.

    Along its longer axis it is cut into a training, a validation and a test strip with a gap
    between them. Strips of validation and test are just wide enough for their tiles.
    """
    along, across = max(width, height), min(width, height)
    rows = across // tile
    if rows == 0:
        return ()
    val, test = -(-VAL_TILES // rows) * tile, -(-TEST_TILES // rows) * tile
    train = min(along - val - test - 2 * GAP, LONGEST * tile)
    if train < 2 * tile:
        return ()
    stride = max(tile * 2 // 5, 1)
    made = []
    start = 0
    for part, length, step in (("train", train, stride), ("val", val, tile), ("test", test, tile)):
        for first in range(start, start + length - tile + 1, step):
            for second in range(0, across - tile + 1, step):
                block = f"{(first - start) // (2 * tile)}_{second // (2 * tile)}"
                left, top = (first, second) if width >= height else (second, first)
                made.append(Tile(label, part, f"{label}_{part}_{block}", left, top, tile))
        start += length + GAP
    return tuple(made)


def _files() -> dict[str, Path]:
    """The photographs on this disk."""
    homes = {"skimage": Path(need("skimage", extra="demo").__file__ or "").parent}
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        homes["sklearn"] = Path(found.origin).parent
    files = {}
    for name, place in PHOTOGRAPHS.items():
        library, _, inside = place.partition("/")
        if library in homes and (homes[library] / inside).is_file():
            files[name] = homes[library] / inside
    if len(files) < len(PHOTOGRAPHS):
        absent = ", ".join(sorted(set(PHOTOGRAPHS) - set(files)))
        raise DataError(
            f"The installed scikit-image and scikit-learn do not carry the photographs {absent}. "
            "Install the versions that constraints.txt names, or use images of your own."
        )
    return files


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        opened = image.convert("RGB")  # all of them have 8 bits, so this loses nothing
    return opened.reduce(2) if min(opened.size) > LARGE else opened


def _write(
    folder: Path, tiles: list[Tile], photographs: dict[str, Image.Image], digest: str
) -> None:
    for made in tiles:
        path = folder / made.key
        path.parent.mkdir(exist_ok=True)
        box = (made.left, made.top, made.left + made.size, made.top + made.size)
        photographs[made.label].crop(box).save(path, compress_level=1)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("path", "label", "group"))
    writer.writerows((made.key, made.label, made.group) for made in tiles)
    write_text(folder / LABELS, table.getvalue())
    train, val, test = (
        tuple(made.key for made in tiles if made.part == part) for part in ("train", "val", "test")
    )
    rule = f"separate strips of each photograph, {GAP} pixels apart"
    groups = {made.key: made.group for made in tiles}
    write_split(folder / SPLIT, Split(train, val, test, None, rule, groups=groups))
    keys = sorted(made.key for made in tiles)
    write_json(folder / MANIFEST, {"digest": digest, "tile": tiles[0].size, "files": keys})


def _is_made(folder: Path, digest: str) -> bool:
    manifest = _manifest(folder)
    return manifest.get("digest") == digest and all(
        (folder / name).is_file() for name in (*manifest["files"], LABELS, SPLIT)
    )


def _manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _clear(folder: Path) -> None:
    """Takes away an older set of tiles, and nothing that someone else has put there."""
    if not folder.exists():
        return
    own = {*_manifest(folder).get("files", ()), LABELS, SPLIT, MANIFEST}
    foreign = [name for name in _below(folder) if name not in own]
    if foreign:
        raise DataError(
            f"{folder} holds files that are no demo tiles, e.g. {foreign[0]}. Choose another "
            "folder, or empty this one."
        )
    shutil.rmtree(folder)


def _below(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask

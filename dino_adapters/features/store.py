"""FeatureStore: vectors of frozen backbones on disk, computed once.

folder/<size>px-<digest of the spec>/
    manifest.json        the spec, and per shard the keys and file digests of its rows
    vectors-000000.npy   float32 (n, 2, D): CLS token and mean patch token
    patches-000000.npy   float16 (n, N, D), only where patches were asked for

A shard's arrays are written before the manifest that names them. A run killed between the two
leaves files that no manifest names; the next writer removes them. Rows are never changed: a file
that changed gets a new row, and the key then points to that one.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dino_adapters.contracts import DataError, FeatureSpec, ShapeError
from dino_adapters.runtime.files import atomic, json_digest, write_text
from dino_adapters.runtime.runfolder import RunFolder

LOGGER = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """Vectors of images in the order they were asked for.

    Attributes:
        keys: Sample keys, length n.
        cls: `(n, D)` float32 CLS tokens (pooled maps for networks without one).
        mean: `(n, D)` float32 mean of the patch tokens, registers left out.
        patches: `(n, N, D)` float16 patch tokens, row-major over `grid`; None unless asked for.
        grid: `(h, w)` of the patches.
    """

    keys: tuple[str, ...]
    cls: np.ndarray
    mean: np.ndarray
    patches: np.ndarray | None
    grid: tuple[int, int]


class FeatureStore:
    """One store: all its vectors were made to one `FeatureSpec`.

    Attributes:
        folder: Where the shards and the manifest lie.
        spec: What decides the numbers.
        embed_dim: D.
        grid: `(h, w)` of the patch tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a store that exists; `FeatureStore.prepare` makes one.

        Raises:
            DataError: there is no manifest, or one that this version cannot read.
        """
        self.folder = Path(folder)
        self._load()

    def _load(self) -> None:
        manifest = _read_manifest(self.folder / MANIFEST)
        self.spec = _spec_from(manifest["spec"])
        self.embed_dim = int(manifest["embed_dim"])
        self.grid: tuple[int, int] = (int(manifest["grid"][0]), int(manifest["grid"][1]))
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._rows: dict[str, tuple[str, int, int]] = {}
        for number, shard in enumerate(self._shards):
            if self._is_whole(shard):
                self._index(number, shard)
            else:
                LOGGER.warning(
                    "%s: shard %s is damaged or gone; its %d images count as missing.",
                    self.folder,
                    shard["name"],
                    len(shard["keys"]),
                )

    @classmethod
    def prepare(
        cls, parent: Path, spec: FeatureSpec, *, embed_dim: int, grid: tuple[int, int]
    ) -> Self:
        """The store of this spec below `parent`, made if it is not there.

        Raises:
            DataError: a store stands there that was made to another spec or shape.
        """
        folder = parent / store_name(spec)
        if not (folder / MANIFEST).exists():
            empty = {"embed_dim": embed_dim, "grid": list(grid), "shards": []}
            _write_manifest(folder / MANIFEST, {"spec": asdict(spec)} | empty)
        store = cls(folder)
        if (store.spec, store.embed_dim, store.grid) != (spec, embed_dim, grid):
            raise DataError(
                f"{folder} holds vectors of {store.spec}, width {store.embed_dim}, grid "
                f"{store.grid}; asked for were {spec}, {embed_dim}, {grid}. Remove that folder, or "
                "name another one for features."
            )
        return store

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all images that are here, sorted."""
        return tuple(sorted(self._rows))

    def __len__(self) -> int:
        """Number of images that are here."""
        return len(self._rows)

    def missing(self, digests: Mapping[str, str], *, patches: bool = False) -> tuple[str, ...]:
        """Keys still to be computed, in the order given.

        Args:
            digests: Sample key to the digest of its file now; a changed file counts as missing.
            patches: Count images without stored patch tokens as missing, too.
        """
        absent = []
        for key, digest in digests.items():
            row = self._rows.get(key)
            if row is None or row[0] != digest or (patches and not self._has_patches(row)):
                absent.append(key)
        return tuple(absent)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the store for one writer, and removes what a killed one left.

        Raises:
            RunFolderError: another process writes here.
        """
        with RunFolder(self.folder).lock():
            # Another writer may have added shards since this object was opened.
            self._load()
            known = {name for shard in self._shards for name in _files_of(shard)}
            for pattern in ("vectors-*.npy", "patches-*.npy", ".*.part"):
                for path in self.folder.glob(pattern):
                    if path.name not in known:
                        path.unlink()
            yield

    def append(
        self,
        digests: Mapping[str, str],
        cls: np.ndarray,
        mean: np.ndarray,
        patches: np.ndarray | None = None,
    ) -> None:
        """Writes one shard; call it inside `writing`.

        Args:
            digests: Sample key to file digest, one per row and in row order.
            cls: `(n, D)`.
            mean: `(n, D)`.
            patches: `(n, N, D)`, stored as float16.

        Raises:
            ShapeError: the arrays do not fit each other or the store.
            DataError: a vector is not finite (in float16 for patches).
        """
        count, tokens = len(digests), self.grid[0] * self.grid[1]
        wanted: dict[str, tuple[int, ...]] = {
            "cls": (count, self.embed_dim),
            "mean": (count, self.embed_dim),
        }
        given = {"cls": cls, "mean": mean}
        if patches is not None:
            wanted["patches"] = (count, tokens, self.embed_dim)
            # float16 cannot hold numbers above 65504: the check below sees what became infinite.
            with np.errstate(over="ignore"):
                given["patches"] = patches = patches.astype(np.float16)
        for name, array in given.items():
            if array.shape != wanted[name]:
                raise ShapeError(f"{name} is {array.shape}; this store takes {wanted[name]}.")
            _check_finite(name, array, digests)
        name = f"{len(self._shards):06d}"
        shard: dict[str, Any] = {"name": name, "patches": patches is not None, "bytes": []}
        stacked = np.stack([cls, mean], axis=1).astype(np.float32, copy=False)
        arrays = [stacked] if patches is None else [stacked, patches]
        for file, array in zip(_files_of(shard), arrays, strict=True):
            with atomic(self.folder / file) as temporary, temporary.open("wb") as opened:
                np.save(opened, array, allow_pickle=False)
            shard["bytes"].append((self.folder / file).stat().st_size)
        shard |= {"keys": list(digests), "digests": list(digests.values())}
        self._shards.append(shard)
        self._save()
        self._index(len(self._shards) - 1, shard)

    def drop(self, keys: Sequence[str]) -> None:
        """Forgets images, e.g. because their files are no longer readable."""
        gone = {key for key in keys if self._rows.pop(key, None) is not None}
        if gone:
            for shard in self._shards:
                shard["keys"] = [None if key in gone else key for key in shard["keys"]]
            self._save()

    def read(self, keys: Sequence[str], *, patches: bool = False) -> StoredFeatures:
        """Vectors of these images, in this order, copied out of the memory-mapped shards.

        Args:
            keys: Sample keys; one may be asked for more than once.
            patches: Read the patch tokens, too.

        Raises:
            DataError: an image is not here, or has no stored patch tokens.
        """
        self._check_present(keys, patches=patches)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            _, shard, row = self._rows[key]
            by_shard.setdefault(shard, []).append((position, row))
        vectors = np.empty((len(keys), 2, self.embed_dim), np.float32)
        tokens = None
        if patches:
            shape = (len(keys), self.grid[0] * self.grid[1], self.embed_dim)
            tokens = np.empty(shape, np.float16)
        for number, places in by_shard.items():
            positions, rows = (np.array(part) for part in zip(*places, strict=True))
            files = _files_of(self._shards[number])
            vectors[positions] = self._open(files[0])[rows]
            if tokens is not None:
                tokens[positions] = self._open(files[1])[rows]
        # Copies: a view of every second row would keep both halves alive and be slow to multiply.
        cls, mean = vectors[:, 0].copy(), vectors[:, 1].copy()
        return StoredFeatures(tuple(keys), cls, mean, tokens, self.grid)

    def _check_present(self, keys: Sequence[str], *, patches: bool) -> None:
        absent = [key for key in keys if key not in self._rows]
        if absent:
            raise DataError(
                f"{len(absent)} of {len(keys)} images are not in {self.folder} (first: "
                f"'{absent[0]}'). Run embed on them first."
            )
        bare = [key for key in keys if patches and not self._has_patches(self._rows[key])]
        if bare:
            raise DataError(
                f"{len(bare)} images in {self.folder} were stored without patch tokens (first: "
                f"'{bare[0]}'). Run embed with patches=True."
            )

    def _has_patches(self, row: tuple[str, int, int]) -> bool:
        return bool(self._shards[row[1]]["patches"])

    def _open(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)

    def _is_whole(self, shard: dict[str, Any]) -> bool:
        paths = [self.folder / name for name in _files_of(shard)]
        sizes = [path.stat().st_size if path.exists() else -1 for path in paths]
        return sizes == shard["bytes"]

    def _index(self, number: int, shard: dict[str, Any]) -> None:
        for row, (key, digest) in enumerate(zip(shard["keys"], shard["digests"], strict=True)):
            if key is not None:
                self._rows[key] = (digest, number, row)

    def _save(self) -> None:
        content = {"spec": asdict(self.spec), "embed_dim": self.embed_dim, "grid": list(self.grid)}
        _write_manifest(self.folder / MANIFEST, content | {"shards": self._shards})


def store_name(spec: FeatureSpec) -> str:
    """Name of a spec's folder: the size for people, a digest of everything for certainty."""
    return f"{spec.size}px-{json_digest(asdict(spec))[:16]}"


def _files_of(shard: Mapping[str, Any]) -> list[str]:
    kinds = ("vectors", "patches") if shard["patches"] else ("vectors",)
    return [f"{kind}-{shard['name']}.npy" for kind in kinds]


def _check_finite(name: str, array: np.ndarray, keys: Mapping[str, str]) -> None:
    broken = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if broken.any():
        first = list(keys)[int(np.argmax(broken))]
        raise DataError(
            f"The {name} of '{first}' holds numbers that are not finite ({int(broken.sum())} of "
            f"{len(array)} images). Check the file's values, then the backbone's weights."
        )


def _spec_from(content: Mapping[str, Any]) -> FeatureSpec:
    lists = {"bands": tuple(content["bands"]), "layers": tuple(content["layers"])}
    return FeatureSpec(**{**content, **lists})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path.parent} holds no {MANIFEST}, so it is no feature store. Make one with embed."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is no JSON ({error}). Remove its folder and embed again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            f"{path} is not of format {FORMAT}, which this version reads. Remove its folder and "
            "embed again."
        )
    return content


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    # One line: the indented form takes seconds at 100,000 keys, and this runs once a shard.
    write_text(path, json.dumps({"format": FORMAT} | content, ensure_ascii=False) + "\n")

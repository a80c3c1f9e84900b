"""embed: a frozen backbone over a data set, each image once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dino_adapters.contracts import (
    Backbone,
    BackboneInfo,
    DataError,
    FeatureSpec,
    SampleSource,
    ShapeError,
    UnreadableFileError,
)
from dino_adapters.data.resize import to_square
from dino_adapters.data.units import check_size, to_model
from dino_adapters.features.store import FeatureStore
from dino_adapters.runtime.console import Notices, Progress, progress
from dino_adapters.runtime.files import json_digest

LOGGER = logging.getLogger(__name__)
Fit = Literal["crop", "squash"]
SHARD_ROWS = 512
SHARD_BYTES = 128 * 2**20
"""A shard is closed at whichever comes first: what a killed run loses, and what memory holds."""


@dataclass(frozen=True)
class _Rows:
    """Vectors of one batch."""

    digests: dict[str, str]
    cls: np.ndarray
    mean: np.ndarray
    patches: np.ndarray | None


@dataclass
class _Shard:
    """Batches computed and not yet written."""

    batches: list[_Rows] = field(default_factory=list)

    def is_full(self) -> bool:
        rows = sum(len(batch.digests) for batch in self.batches)
        size = sum(batch.patches.nbytes for batch in self.batches if batch.patches is not None)
        return rows >= SHARD_ROWS or size >= SHARD_BYTES

    def flush(self, store: FeatureStore) -> None:
        if not self.batches:
            return
        digests: dict[str, str] = {}
        for batch in self.batches:
            digests |= batch.digests
        patches = [batch.patches for batch in self.batches if batch.patches is not None]
        store.append(
            digests,
            np.concatenate([batch.cls for batch in self.batches]),
            np.concatenate([batch.mean for batch in self.batches]),
            np.concatenate(patches) if patches else None,
        )
        self.batches.clear()


def embed(
    backbone: Backbone,
    source: SampleSource,
    folder: Path,
    *,
    size: int | None = None,
    fit: Fit = "crop",
    patches: bool = False,
    batch_size: int = 32,
    keys: Sequence[str] | None = None,
    workers: int = 2,
    max_unreadable: float = 0.1,
    quiet: bool = False,
    notices: Notices | None = None,
) -> FeatureStore:
    """Computes what the store below `folder` does not hold yet, and returns the store.

    A vector is computed again when its file, the way it is read (bands, value range), the weights,
    the size or the fit changed. Files that cannot be read are skipped, counted and named.

    Args:
        backbone: On the device of the caller's choice; it moves images there itself.
        source: Where the images come from.
        folder: Holds one sub-folder per spec, so one folder can serve many backbones and sizes.
        size: Side in pixels of the square that the network sees; None takes `backbone.info.size`.
        fit: `crop` keeps the middle square of an image, `squash` all of it, distorted.
        patches: Store the patch tokens too: float16 `(N, D)` an image.
        batch_size: Images a pass; vectors depend on it in the last bits at most.
        keys: Which images; None takes all of them.
        workers: Threads that read; vectors do not depend on it.
        max_unreadable: Share of `keys` that may be unreadable.
        quiet: Show no progress.
        notices: Collects what was skipped or converted.

    Returns:
        The store. Its `keys` say what is there; unreadable images are not.

    Raises:
        ShapeError: `size` is no multiple of the patch size.
        DataError: no images, unknown keys, or too many unreadable files. What was computed until
            then is kept.
    """
    notices = Notices() if notices is None else notices
    info = backbone.info
    size = _checked_size(info, size)
    wanted = _checked_keys(source, keys)
    grid = (size // info.patch_size, size // info.patch_size)
    bands = tuple(band.name for band in info.bands)
    spec = FeatureSpec(info.digest, bands, size, fit)
    store = FeatureStore.prepare(folder, spec, embed_dim=info.embed_dim, grid=grid)
    reader = _ImageReader(source, info, size, fit, notices, int(max_unreadable * len(wanted)))
    with store.writing(), ThreadPoolExecutor(max(workers, 1)) as pool:
        digests = reader.digests(wanted, pool)
        todo = store.missing(digests, patches=patches)
        LOGGER.info("%d of %d images are to be embedded at %d px.", len(todo), len(wanted), size)
        shard = _Shard()
        try:
            with progress(f"Embedding at {size} px", len(todo), quiet=quiet) as shown:
                for names, images in reader.batches(todo, batch_size, pool, shown):
                    _compute(backbone, names, images, digests, shard, patches=patches)
                    if shard.is_full():
                        shard.flush(store)
        finally:
            # Whatever stopped the run, Ctrl-C included, what was computed is right and is kept.
            shard.flush(store)
            store.drop(reader.unreadable)
    return store


def _compute(
    backbone: Backbone,
    names: list[str],
    images: Tensor,
    digests: dict[str, str],
    shard: _Shard,
    *,
    patches: bool,
) -> None:
    with torch.inference_mode():
        # In this layout convolutions run faster on a CPU; attention does not mind.
        features = backbone(images.contiguous(memory_format=torch.channels_last))
        tokens = features.patches.float()
        rows = _Rows(
            {name: digests[name] for name in names},
            features.cls.float().cpu().numpy(),
            tokens.mean(dim=1).cpu().numpy(),
            tokens.half().cpu().numpy() if patches else None,
        )
    shard.batches.append(rows)  # one step: an interruption finds all of a batch, or nothing of it


@dataclass
class _Recorder(Notices):
    """Keeps what a thread notes; the main thread passes it on, in the order of the images."""

    noted: list[tuple[str, str, int]] = field(default_factory=list)

    def add(self, what: str, example: str = "", count: int = 1) -> None:
        self.noted.append((what, example, count))


_Outcome = tuple[Tensor | UnreadableFileError, list[tuple[str, str, int]]]


@dataclass
class _ImageReader:
    """Reads and prepares images on threads, hands them out in order, counts failures."""

    source: SampleSource
    info: BackboneInfo
    size: int
    fit: Fit
    notices: Notices
    limit: int
    unreadable: list[str] = field(default_factory=list)

    def digests(self, keys: Sequence[str], pool: ThreadPoolExecutor) -> dict[str, str]:
        """Key to a digest of the file and of how it is read."""
        reading = _reading_digest(self.source)
        found: dict[str, str] = {}
        for key, digest in zip(keys, pool.map(self._try_digest, keys), strict=True):
            if isinstance(digest, UnreadableFileError):
                self._skip(key, digest)
            else:
                found[key] = f"{digest}-{reading}"
        return found

    def batches(
        self, keys: Sequence[str], batch_size: int, pool: ThreadPoolExecutor, shown: Progress
    ) -> Iterator[tuple[list[str], Tensor]]:
        """`(keys, (B, C, size, size))` in the order of `keys`, at most two batches ahead."""
        waiting: deque[tuple[str, Future[_Outcome]]] = deque()
        rest = iter(keys)
        names: list[str] = []
        images: list[Tensor] = []
        try:
            while True:
                while len(waiting) < 2 * batch_size and (key := next(rest, None)) is not None:
                    waiting.append((key, pool.submit(self._try_image, key)))
                if not waiting:
                    break
                key, future = waiting.popleft()
                image, noted = future.result()
                for note in noted:
                    self.notices.add(*note)
                if isinstance(image, UnreadableFileError):
                    shown.step()
                    self._skip(key, image)
                    continue
                names.append(key)
                images.append(image)
                if len(names) == batch_size:
                    yield names, torch.stack(images)
                    shown.step(len(names))
                    names, images = [], []
            if names:
                yield names, torch.stack(images)
                shown.step(len(names))
        finally:
            for _, future in waiting:
                future.cancel()

    def _try_digest(self, key: str) -> str | UnreadableFileError:
        try:
            return self.source.digest(key)
        except (UnreadableFileError, OSError) as error:
            return _unreadable(error)

    def _try_image(self, key: str) -> _Outcome:
        """The prepared image or why there is none, and what is to be noted about it."""
        recorder = _Recorder()
        try:
            sample = self.source.read(key)
            check_size(sample, self.info.patch_size)
        except (UnreadableFileError, OSError) as error:
            return _unreadable(error), []
        image = to_model(sample, self.info, notices=recorder)
        return to_square(image, self.size, self.fit), recorder.noted

    def _skip(self, key: str, error: UnreadableFileError) -> None:
        self.unreadable.append(key)
        self.notices.add("Unreadable files skipped", key)
        if len(self.unreadable) > self.limit:
            raise DataError(
                f"{len(self.unreadable)} files cannot be read, and at most {self.limit} may be "
                f"(first: '{self.unreadable[0]}'; last: {error}). Repair or remove them, or raise "
                "max_unreadable."
            ) from error


def _unreadable(error: UnreadableFileError | OSError) -> UnreadableFileError:
    return error if isinstance(error, UnreadableFileError) else UnreadableFileError(str(error))


def _reading_digest(source: SampleSource) -> str:
    """Digest of the bands and value ranges that a source gives its images.

    The user may state them anew (another `value_range`) while the files stay the same; vectors made
    before are then wrong, and only a read sample tells.
    """
    for key in source.keys:
        try:
            return json_digest([repr(band) for band in source.read(key).bands])[:8]
        except (UnreadableFileError, OSError):
            continue
    return "unread"


def _checked_size(info: BackboneInfo, size: int | None) -> int:
    size = info.size if size is None else size
    patch = info.patch_size
    if size <= 0 or size % patch:
        below = max(size // patch, 1) * patch
        near = below if size - below <= patch / 2 else below + patch
        raise ShapeError(
            f"size is {size}, which is no multiple of the patch size {patch} of '{info.name}'. "
            f"The nearest is {near}."
        )
    return size


def _checked_keys(source: SampleSource, keys: Sequence[str] | None) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(source.keys if keys is None else keys))
    if not wanted:
        raise DataError("There are no images to embed. Check the source and the keys asked for.")
    strangers = set(wanted) - set(source.keys)
    if strangers:
        raise DataError(
            f"{len(strangers)} of {len(wanted)} keys are not in the source (first: "
            f"'{min(strangers)}'). Take keys from source.keys."
        )
    return wanted

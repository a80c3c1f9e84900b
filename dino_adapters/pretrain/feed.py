"""Batches as a function of the step: a resumed run, or one with other workers, sees the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_adapters.contracts import DataError, UnreadableFileError
from dino_adapters.data.damage import problem_of
from dino_adapters.data.resize import unit_range
from dino_adapters.pretrain.kin import appearance
from dino_adapters.runtime.chance import generator, numpy_generator
from dino_adapters.runtime.console import Notices

AHEAD = 2  # batches decoded while the device works on the present one
Place = tuple[str, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one step.

    Attributes:
        images: `(B, C, S, S)` float32 in 0..1.
        keys: B sample keys.
        looks: `(B, 256)`, the `kin.appearance` of the whole images.
    """

    images: Tensor
    keys: tuple[str, ...]
    looks: Tensor


class Pool:
    """Copies tensors into large blocks of memory, to be kept for good.

    Small tensors that stay, between large ones that come and go, would break the heap into pieces
    that nothing fits into: measured, 27 MB of kept images cost a run 135 MB.
    """

    BLOCK = 32 * 2**20
    ALIGN = 64

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the CPU; not for several threads at once."""
        size = tensor.numel() * tensor.element_size()
        if self._used + size > len(self._block):
            self._block, self._used = torch.empty(max(self.BLOCK, size), dtype=torch.uint8), 0
        place = self._block[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // self.ALIGN) * self.ALIGN
        return place.copy_(tensor)


class Feed:
    """Square images in 0..1, batch by batch.

    Workers are threads: decoding and resizing release the interpreter's lock, memory is shared, and
    nothing needs to be pickled. An unreadable file gives its place to the next readable one in the
    epoch's order; it is counted and named.

    Args:
        keys: all images.
        decode: key to `(C, h, w)`, uint8 or float32 in 0..1, shorter side = `side`; raises
            UnreadableFileError.
        side: side of the squares handed out; longer images lose a random part each time.
        batch_size: images of one step on all devices; sets smaller than that repeat within a batch.
        share: the places in it that are handed out here; None is all of them.
        seed: of order and windows.
        workers: decoding threads; 0 decodes in the calling thread.
        memory_gb: decoded images are kept up to this size.
        max_unreadable: share of unreadable files above which the run stops.
        notices: where unreadable files are counted.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        decode: Callable[[str], Tensor],
        *,
        side: int,
        batch_size: int,
        seed: int,
        workers: int,
        memory_gb: float,
        max_unreadable: float,
        notices: Notices,
        share: range | None = None,
    ) -> None:
        self.keys, self.decode, self.side = keys, decode, side
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.share = range(batch_size) if share is None else share
        self.max_unreadable, self.notices = max_unreadable, notices
        self._room = int(memory_gb * 1e9)
        self._pool = Pool()
        self._kept: dict[str, Tensor] = {}
        self._looks: dict[str, Tensor] = {}
        self._bad: set[str] = set()
        self._lock = threading.Lock()
        self._orders: dict[int, np.ndarray] = {}

    def batches(self, first_step: int, steps: int) -> Iterator[Batch]:
        """Batches of the steps `first_step` to `steps - 1`."""
        if self.workers == 0:
            for step in range(first_step, steps):
                yield batch_of([self._image(step, slot) for slot in self.share])
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="feed") as pool:
            waiting: list[list[Future[Place]]] = []
            for step in range(first_step, min(first_step + AHEAD, steps)):
                waiting.append(self._submit(pool, step))
            try:
                for step in range(first_step, steps):
                    if step + AHEAD < steps:
                        waiting.append(self._submit(pool, step + AHEAD))
                    yield batch_of([place.result() for place in waiting.pop(0)])
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[Future[Place]]:
        return [pool.submit(self._image, step, slot) for slot in self.share]

    def _image(self, step: int, slot: int) -> Place:
        """The key of one place in one batch, its image as a square window, and its look."""
        place = step * self.batch_size + slot
        for offset in range(len(self.keys)):
            key = self._key_at(place, offset)
            image = self._decoded(key)
            if image is not None:
                return key, self._window(image, step, slot), self._look(key, image)
        raise DataError("None of the images can be read. Run `dino-adapters inspect` on the data.")

    def _key_at(self, place: int, offset: int) -> str:
        epoch, position = divmod(place, len(self.keys))
        with self._lock:
            if epoch not in self._orders:
                self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
                order = numpy_generator(self.seed, "order", epoch).permutation(len(self.keys))
                self._orders[epoch] = order
            order = self._orders[epoch]
        return self.keys[order[(position + offset) % len(self.keys)]]

    def _decoded(self, key: str) -> Tensor | None:
        with self._lock:
            if key in self._bad:
                return None
            if key in self._kept:
                return self._kept[key]
        try:
            image = self.decode(key)
        except UnreadableFileError as error:
            self._refuse(key, error)
            return None
        with self._lock:
            size = image.numel() * image.element_size()
            if size <= self._room and key not in self._kept:
                self._room -= size
                self._kept[key] = image = self._pool.keep(image)
        return image

    def _look(self, key: str, image: Tensor) -> Tensor:
        with self._lock:
            if key in self._looks:
                return self._looks[key]
        look = appearance(image)
        with self._lock:
            self._looks[key] = self._pool.keep(look)  # a kilobyte an image
        return look

    def _refuse(self, key: str, error: UnreadableFileError) -> None:
        with self._lock:
            if key in self._bad:
                return
            self._bad.add(key)
            share = len(self._bad) / len(self.keys)
            self.notices.add("unreadable file skipped", problem_of(key, error))
        if share > self.max_unreadable:
            raise DataError(
                f"{len(self._bad)} of {len(self.keys)} images cannot be read, more than "
                f"data.max_unreadable={self.max_unreadable:g} allows (last: {error}). Mend or "
                "remove them, or raise that limit."
            ) from error

    def _window(self, image: Tensor, step: int, slot: int) -> Tensor:
        spare = (image.shape[-2] - self.side, image.shape[-1] - self.side)
        draws = torch.rand(2, generator=generator(self.seed, "window", step, slot))
        top, left = (int(share * (rest + 1)) for share, rest in zip(draws, spare, strict=True))
        square = image[:, top : top + self.side, left : left + self.side]
        return unit_range(square)


def batch_of(places: Sequence[Place]) -> Batch:
    """The images of one step in one tensor."""
    keys, images, looks = zip(*places, strict=True)
    return Batch(torch.stack(images), keys, torch.stack(looks))

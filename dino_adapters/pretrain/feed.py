"""Batches as a function of the step: a resumed run, or one with other workers, sees the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dino_adapters.contracts import DataError, UnreadableFileError
from dino_adapters.runtime.chance import generator, numpy_generator
from dino_adapters.runtime.console import Notices

AHEAD = 2  # batches decoded while the device works on the present one


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
        batch_size: images of one step; sets smaller than that repeat within a batch.
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
    ) -> None:
        self.keys, self.decode, self.side = keys, decode, side
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.max_unreadable, self.notices = max_unreadable, notices
        self._room = int(memory_gb * 1e9)
        self._kept: dict[str, Tensor] = {}
        self._bad: set[str] = set()
        self._lock = threading.Lock()
        self._orders: dict[int, np.ndarray] = {}

    def batches(self, first_step: int, steps: int) -> Iterator[Tensor]:
        """Batches `(B, C, side, side)` float32 of the steps `first_step` to `steps - 1`."""
        if self.workers == 0:
            for step in range(first_step, steps):
                yield torch.stack([self._image(step, slot) for slot in range(self.batch_size)])
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="feed") as pool:
            waiting: list[list[Future[Tensor]]] = []
            for step in range(first_step, min(first_step + AHEAD, steps)):
                waiting.append(self._submit(pool, step))
            try:
                for step in range(first_step, steps):
                    if step + AHEAD < steps:
                        waiting.append(self._submit(pool, step + AHEAD))
                    yield torch.stack([image.result() for image in waiting.pop(0)])
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[Future[Tensor]]:
        return [pool.submit(self._image, step, slot) for slot in range(self.batch_size)]

    def _image(self, step: int, slot: int) -> Tensor:
        """The image of one place in one batch, as a square window."""
        place = step * self.batch_size + slot
        for offset in range(len(self.keys)):
            image = self._decoded(self._key_at(place, offset))
            if image is not None:
                return self._window(image, step, slot)
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
                self._kept[key] = image
        return image

    def _refuse(self, key: str, error: UnreadableFileError) -> None:
        with self._lock:
            if key in self._bad:
                return
            self._bad.add(key)
            share = len(self._bad) / len(self.keys)
            self.notices.add("unreadable file skipped", f"{key}: {error}")
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
        return square.float() / 255 if square.dtype == torch.uint8 else square.float()

"""Pages of idle sessions on their way out of a KV pool and back: to page-locked memory first, then to the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
import torch

from petalsd._C import SpillFile
from petalsd.errors import SpillError
from petalsd.kvcache.host_store import HostStore, Transfers
from petalsd.kvcache.observer import PoolObserver

log = structlog.get_logger(__name__)

# Pages of another device go through a buffer on the host; this bounds it.
_STAGING_BYTES = 32 << 20

_Places = list[tuple[int, int]]
_Move = Callable[[bytearray, _Places], None]


@dataclass(frozen=True, slots=True)
class SpillArea:
    """Where pages of idle sessions may lie.

    directory        on a disk, not in memory
    max_bytes        of the file; 0: there is none
    keep_free_bytes  what the disk keeps for others: the file does not grow into it
    host_bytes       of the host's memory, for pages of a GPU, which are put there before the file is used
    """

    directory: Path
    max_bytes: int
    keep_free_bytes: int
    host_bytes: int = 0


class Spill:
    """Moves pages between a pool's slabs and its slots: the first ones in host memory, the others in the file.

    ``transfers`` are as in ``petalsd._C.SpillFile``, with slots counted over both.
    """

    def __init__(self, area: SpillArea, observer: PoolObserver) -> None:
        self.area = area
        self.file = SpillFile(str(area.directory), area.max_bytes, area.keep_free_bytes)
        self._observer = observer
        self._slabs: tuple[torch.Tensor, ...] = ()
        self._host: HostStore | None = None

    def open(self, slabs: Sequence[torch.Tensor]) -> None:
        """Make the file for these slabs, ``[N, ...]`` each, contiguous, of any dtypes.

        Where that fails it is logged, and the pool promises what its memory holds.
        """
        self._slabs = tuple(slabs)
        self._host = HostStore(slabs, self.area.host_bytes)
        try:
            self.file.open(sum(slab[0].nbytes for slab in slabs), self._host.num_slots)
        except SpillError as error:
            log.error("kv_spill_unavailable", directory=str(self.area.directory), error=error.message)
            self._observer.spill_failed()

    def write(self, transfers: bytearray) -> None:
        """Copy pages to their slots; SpillError when the disk or the memory fails."""
        started = time.perf_counter()
        near, far = self._by_place(transfers)
        with self._noting_failures("write"):
            self._store.write(near)
            self._move(self.file.write, far, self._staged_write)
        seconds = time.perf_counter() - started
        self._observer.spilled(self._num_bytes(transfers), seconds)

    def read(self, transfers: bytearray) -> None:
        """Copy pages back; SpillError when the disk or the memory fails, their content is undefined then."""
        started = time.perf_counter()
        near, far = self._by_place(transfers)
        with self._noting_failures("read"):
            self._store.read(near)
            self._move(self.file.read, far, self._staged_read)
        seconds = time.perf_counter() - started
        self._observer.restored(self._num_bytes(transfers), seconds)

    def close(self) -> None:
        """Give disk and memory back; the last thing to be done with it."""
        self.file.close()
        self._slabs, self._host = (), None

    @property
    def host_bytes(self) -> int:
        """Host memory that is taken now."""
        return 0 if self._host is None else self._host.allocated_bytes

    @property
    def _store(self) -> HostStore:
        assert self._host is not None, "open() first"
        return self._host

    def _by_place(self, transfers: bytearray) -> tuple[Transfers, bytearray]:
        """Those to slots in host memory, and those to the file, by its own slots."""
        triples, border = _triples(transfers), self._store.num_slots
        if border == 0:
            return triples[:0], transfers
        near, far = triples.copy(), triples.copy()
        near[:, 2] = np.clip(border - near[:, 1], 0, near[:, 2])
        far[:, 2] -= near[:, 2]
        far[:, 0] += near[:, 2]
        far[:, 1] += near[:, 2] - border
        return near[near[:, 2] > 0], bytearray(far[far[:, 2] > 0].tobytes())

    def _move(self, move: _Move, transfers: bytearray, staged: Callable[[bytearray], None]) -> None:
        if not transfers:
            return
        if self._slabs[0].device.type == "cpu":
            move(transfers, _places(self._slabs))
        else:
            staged(transfers)

    @contextmanager
    def _noting_failures(self, operation: str) -> Iterator[None]:
        """Want of the device's memory for a buffer is one of its sessions, too, and not of all."""
        try:
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise SpillError("the device has no memory left for a buffer") from error
        except SpillError as error:
            log.error("kv_spill_failed", operation=operation, error=error.message)
            self._observer.spill_failed()
            raise

    def _staged_write(self, transfers: bytearray) -> None:
        for pages, staged in self._chunks(transfers):
            buffers = [slab.index_select(0, pages.to(slab.device)).cpu() for slab in self._slabs]
            self.file.write(staged, _places(buffers))

    def _staged_read(self, transfers: bytearray) -> None:
        for pages, staged in self._chunks(transfers):
            buffers = [torch.empty(len(pages), *slab.shape[1:], dtype=slab.dtype) for slab in self._slabs]
            self.file.read(staged, _places(buffers))
            for slab, buffer in zip(self._slabs, buffers, strict=True):
                slab.index_copy_(0, pages.to(slab.device), buffer.to(slab.device))

    def _chunks(self, transfers: bytearray) -> Iterator[tuple[torch.Tensor, bytearray]]:
        """The pages of a few transfers at a time, int64, and these transfers as if from a slab of only them."""
        limit = max(1, _STAGING_BYTES // sum(slab[0].nbytes for slab in self._slabs))
        triples = _triples(transfers)
        ends = np.cumsum(triples[:, 2])
        for chunk in np.split(triples, np.flatnonzero(np.diff(ends // limit)) + 1):
            staged = chunk.copy()
            staged[:, 0] = np.cumsum(chunk[:, 2]) - chunk[:, 2]
            pages = np.concatenate([np.arange(page, page + count) for page, _, count in chunk.tolist()])
            yield torch.from_numpy(pages), bytearray(staged.tobytes())

    def _num_bytes(self, transfers: bytearray) -> int:
        return int(_triples(transfers)[:, 2].sum()) * sum(slab[0].nbytes for slab in self._slabs)


def _triples(transfers: bytearray) -> Transfers:
    return np.frombuffer(transfers, dtype=np.int32).reshape(-1, 3)


def _places(slabs: Sequence[torch.Tensor]) -> _Places:
    return [(slab.data_ptr(), slab[0].nbytes) for slab in slabs]

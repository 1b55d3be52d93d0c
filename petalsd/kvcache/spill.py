"""The spill file of a KV pool: pages of idle sessions on their way to the disk and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
import torch

from petalsd._C import SpillFile
from petalsd.errors import SpillError
from petalsd.kvcache.observer import PoolObserver

log = structlog.get_logger(__name__)

# Pages of another device go through a buffer on the host; this bounds it.
_STAGING_BYTES = 32 << 20

_Places = list[tuple[int, int]]
_Move = Callable[[bytearray, _Places], None]


@dataclass(frozen=True, slots=True)
class SpillArea:
    """Where pages of idle sessions may lie on the disk.

    directory        on a disk, not in memory
    max_bytes        of the file
    keep_free_bytes  what the disk keeps for others: the file does not grow into it
    """

    directory: Path
    max_bytes: int
    keep_free_bytes: int


class Spill:
    """Moves pages between the slabs of a pool and its file. ``transfers`` are as in ``petalsd._C.SpillFile``."""

    def __init__(self, area: SpillArea, observer: PoolObserver) -> None:
        self.area = area
        self.file = SpillFile(str(area.directory), area.max_bytes, area.keep_free_bytes)
        self._observer = observer
        self._slabs: tuple[torch.Tensor, ...] = ()

    def open(self, slabs: Sequence[torch.Tensor]) -> None:
        """Make the file for these slabs, ``[N, ...]`` each, contiguous, of any dtypes.

        Where that fails it is logged, and the pool promises what its memory holds.
        """
        self._slabs = tuple(slabs)
        try:
            self.file.open(sum(slab[0].nbytes for slab in slabs))
        except SpillError as error:
            log.error("kv_spill_unavailable", directory=str(self.area.directory), error=error.message)
            self._observer.spill_failed()

    def write(self, transfers: bytearray) -> None:
        """Copy pages to the file; SpillError when the disk fails."""
        seconds = self._move(self.file.write, transfers, self._staged_write, "write")
        self._observer.spilled(self._num_bytes(transfers), seconds)

    def read(self, transfers: bytearray) -> None:
        """Copy pages back; SpillError when the disk fails, their content is undefined then."""
        seconds = self._move(self.file.read, transfers, self._staged_read, "read")
        self._observer.restored(self._num_bytes(transfers), seconds)

    def close(self) -> None:
        """Give the disk back; the last thing to be done with it."""
        self.file.close()

    def _move(
        self, move: _Move, transfers: bytearray, staged: Callable[[bytearray], None], what: str
    ) -> float:
        """The seconds it took."""
        started = time.perf_counter()
        try:
            if self._slabs[0].device.type == "cpu":
                move(transfers, _places(self._slabs))
            else:
                staged(transfers)
        except SpillError as error:
            log.error("kv_spill_failed", operation=what, error=error.message)
            self._observer.spill_failed()
            raise
        return time.perf_counter() - started

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


def _triples(transfers: bytearray) -> npt.NDArray[np.int32]:
    """``[n, 3]``: page, slot, pages."""
    return np.frombuffer(transfers, dtype=np.int32).reshape(-1, 3)


def _places(slabs: Sequence[torch.Tensor]) -> _Places:
    return [(slab.data_ptr(), slab[0].nbytes) for slab in slabs]

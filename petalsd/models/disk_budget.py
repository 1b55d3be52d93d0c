"""How much of the disk cached weights may take, and which go first when room is needed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import structlog

from petalsd.errors import WeightsError
from petalsd.file_locks import lock_within

log = structlog.get_logger(__name__)

RESERVE_BYTES = 1 << 30
"""Left free on the disk whatever the budget says."""

_LOCK_DEADLINE_S = 3600.0


class DiskBudget:
    """Owns the files under ``root/*/blobs``. Their modification time says when they were last used.

    ``max_bytes`` None: bounded by the disk alone. What is held stays: all that a process reads shares one budget.
    ``make_room`` is called under ``lock``, which works across processes.
    """

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._held: set[Path] = set()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process downloads into a cache, or evicts from it, at a time; WeightsError after an hour."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a") as file:
            if not lock_within(file.fileno(), _LOCK_DEADLINE_S):
                raise WeightsError(
                    f"another process has held the weights cache for {_LOCK_DEADLINE_S:.0f} s",
                    hint="see who downloads into the same model.cache_dir",
                )
            yield

    def hold(self, paths: Iterable[Path]) -> None:
        """Delete none of these until they are released."""
        self._held.update(paths)

    def release(self, paths: Iterable[Path]) -> None:
        """These may go when room is needed."""
        self._held.difference_update(paths)

    def make_room(self, needed_bytes: int, part: Path) -> None:
        """Delete the least recently used files, but what is held and ``part``, until this much more fits.

        WeightsError where it does not.
        """
        candidates = sorted(
            (path for path in self.root.glob("*/blobs/*") if path not in self._held and path != part),
            key=lambda path: path.stat().st_mtime,
        )
        available = self._available_bytes()
        evictable = sum(path.stat().st_size for path in candidates)
        if available + evictable < needed_bytes:
            raise WeightsError(
                f"{_gib(needed_bytes)} of weights do not fit: {_gib(max(available, 0))} available, "
                f"{_gib(evictable)} could be freed",
                hint="free the disk, raise model.max_disk_bytes, serve fewer blocks, or set model.cache_dir",
            )
        for path in candidates:
            if available >= needed_bytes:
                return
            available += path.stat().st_size
            log.info("weights_evicted", file=path.name, nbytes=path.stat().st_size)
            path.unlink()

    def touch(self, path: Path) -> None:
        """Say that this file is used now."""
        with contextlib.suppress(
            OSError
        ):  # a cache that is only readable is fine, its order is just not kept
            os.utime(path)

    def _available_bytes(self) -> int:
        free = shutil.disk_usage(self.root).free - RESERVE_BYTES
        if self._max_bytes is None:
            return free
        used = sum(path.stat().st_size for path in self.root.glob("*/blobs/*"))
        return min(free, self._max_bytes - used)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

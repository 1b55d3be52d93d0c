"""How much room there is where the daemon writes. A network disk may hang, and must not take the loop along."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from petalsd.daemon.detached import AbandonSwitch, run_detached
from petalsd.metrics import Reading

_ANSWER_S = 5.0
_MIN_FREE_BYTES = 256 * 2**20


class Disks:
    """``directories`` by the name that the metric has for them. ``readings`` are of the last look."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        self._directories = dict(directories)
        self._looks: dict[str, asyncio.Task[int]] = {}
        self._free_bytes: dict[str, int] = {}

    async def look(self) -> list[str]:
        """What is wrong with them, in words. One that does not answer is not asked again until it does."""
        for name, directory in self._directories.items():
            if name not in self._looks:
                self._looks[name] = asyncio.create_task(_free_bytes(directory), name=f"disk-{name}")
        if self._looks:
            await asyncio.wait(self._looks.values(), timeout=_ANSWER_S)
        troubles = (self._trouble_of(name, directory) for name, directory in self._directories.items())
        return [trouble for trouble in troubles if trouble]

    def close(self) -> None:
        """Wait for no answer any more."""
        for look in self._looks.values():
            look.cancel()

    def readings(self) -> Iterator[Reading]:
        for name, free_bytes in self._free_bytes.items():
            yield Reading("disk_free_bytes", free_bytes, (name,))

    def _trouble_of(self, name: str, directory: Path) -> str:
        """Empty when there is room."""
        self._free_bytes.pop(name, None)
        if not self._looks[name].done():
            return f"{directory} does not answer"
        try:
            free_bytes = self._free_bytes[name] = self._looks.pop(name).result()
        except OSError as error:
            return f"{directory}: {error.strerror}"
        return f"{free_bytes / 2**20:.0f} MiB left in {directory}" if free_bytes < _MIN_FREE_BYTES else ""


async def _free_bytes(directory: Path) -> int:
    def look(_: AbandonSwitch) -> int:
        return shutil.disk_usage(directory).free

    return await run_detached(look, "petalsd-disk")

"""What the daemon depends on and cannot heal by itself: room on its disks, and a swarm that answers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable
from pathlib import Path

import structlog

from petalsd.daemon.backoff import Backoff
from petalsd.daemon.presence import SwarmPresence
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import PetalsdError

log = structlog.get_logger(__name__)

_PERIOD_S = 20.0
_LOOK_S = 30.0
_MIN_FREE_BYTES = 256 * 2**20
_REDIAL = Backoff(attempts=2**31, first_delay_s=2.0, max_delay_s=60.0)


class Surroundings:
    """``disks`` are directories that the daemon writes to."""

    def __init__(self, member: SwarmPresence, disks: Iterable[Path], board: WarningBoard) -> None:
        self._member = member
        self._disks = tuple(disks)
        self._board = board
        self._lost_for = 0

    async def run(self) -> None:
        """Look around again and again; while the swarm is lost, sooner at first and then more patiently."""
        while True:
            self.look_at_disks()
            await self.look_for_the_swarm()
            await asyncio.sleep(_REDIAL.delay_s(self._lost_for) if self._lost_for else _PERIOD_S)

    def look_at_disks(self) -> None:
        if troubles := [trouble for disk in self._disks if (trouble := _trouble_of(disk))]:
            self._board.set("disk_full", ", ".join(troubles))
        else:
            self._board.clear("disk_full")

    async def look_for_the_swarm(self) -> None:
        """Dial the first peers again when nobody answers; announce again once somebody does."""
        try:
            async with asyncio.timeout(_LOOK_S):
                is_in_touch = await self._member.is_in_touch()
        except (PetalsdError, TimeoutError):
            return  # not a member just now: whoever heals that says so
        if is_in_touch:
            if self._lost_for:
                log.info("swarm_found", after_attempts=self._lost_for)
                await self._tell_again()
            self._lost_for = 0
            self._board.clear("swarm_unreachable")
            return
        if not self._lost_for:
            log.error("swarm_lost")
        self._lost_for += 1
        self._board.set("swarm_unreachable", f"{self._lost_for} attempts")

    async def _tell_again(self) -> None:
        """Nodes that were away may have forgotten us, and what we wrote meanwhile has reached nobody."""
        try:
            await self._member.renew()
        except PetalsdError as error:  # the announcer goes on trying
            log.warning("renewal_failed", error=str(error))


def _trouble_of(directory: Path) -> str:
    """Empty when there is room."""
    try:
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        return f"{directory}: {error.strerror}"
    return f"{free_bytes / 2**20:.0f} MiB left in {directory}" if free_bytes < _MIN_FREE_BYTES else ""

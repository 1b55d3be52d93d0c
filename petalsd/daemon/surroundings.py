"""What the daemon depends on and cannot heal by itself: room on its disks, and a swarm that answers."""

from __future__ import annotations

import asyncio

import structlog

from petalsd.daemon.backoff import Backoff
from petalsd.daemon.disks import Disks
from petalsd.daemon.presence import SwarmPresence
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import PetalsdError

log = structlog.get_logger(__name__)

_PERIOD_S = 20.0
_LOOK_S = 30.0
_REDIAL = Backoff(attempts=2**31, first_delay_s=2.0, max_delay_s=60.0)


class Surroundings:
    """``run`` closes ``disks``, and nobody else looks at them."""

    def __init__(self, member: SwarmPresence, disks: Disks, board: WarningBoard) -> None:
        self._member = member
        self._disks = disks
        self._board = board
        self._lost_for = 0

    async def run(self) -> None:
        """Look around again and again; while the swarm is lost, sooner at first and then more patiently."""
        try:
            while True:
                await self.look_at_disks()
                await self.look_for_the_swarm()
                await asyncio.sleep(_REDIAL.delay_s(self._lost_for) if self._lost_for else _PERIOD_S)
        finally:
            self._disks.close()

    async def look_at_disks(self) -> None:
        """A warning while one is almost full, gone, or silent."""
        troubles = await self._disks.look()
        self._board.note("disk_full", ", ".join(troubles) if troubles else None)

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

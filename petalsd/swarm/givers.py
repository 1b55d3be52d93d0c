"""Who may hand sessions to us: servers of the same blocks, as far as the directory tells."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from petalsd.errors import BadRequest, PetalsdError
from petalsd.swarm.directory import SwarmView
from petalsd.types import BlockSpan

_FRESH_S = 60.0
_PAUSE_S = 5.0  # strangers do not make us read the directory more often


class UnknownGiver(BadRequest):
    """The directory does not list the peer under the blocks of the session that it offers."""


class KnownGivers:
    """Looks peers up with ``read``, in one reading of the directory for all who ask within a while."""

    def __init__(
        self, read: Callable[[], Awaitable[SwarmView]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._clock = clock
        self._view: SwarmView | None = None
        self._failure: PetalsdError | None = None
        self._read_at_s = self._tried_at_s = -math.inf
        self._reading: asyncio.Task[None] | None = None

    async def check(self, peer: str, span: BlockSpan) -> None:
        """UnknownGiver unless ``peer`` is listed under all blocks of ``span``; errors as of ``read``.

        In any state: a giver has said OFFLINE of the blocks that it leaves.
        """
        if not self._knows(peer, span) and self._clock() - self._tried_at_s > _PAUSE_S:
            await self._look()
        if self._knows(peer, span):
            return
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        raise UnknownGiver(
            "giver", peer, f"the directory does not list this peer as a server of blocks {span}"
        )

    async def _look(self) -> None:
        """For all who wait for it; it goes on when one of them gives up."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._look_anew(), name="reading of givers")
        await asyncio.shield(self._reading)

    async def _look_anew(self) -> None:
        try:
            self._view, self._failure = await self._read(), None
            self._read_at_s = self._clock()
        except PetalsdError as error:
            self._failure = error
        finally:
            self._tried_at_s = self._clock()

    def _knows(self, peer: str, span: BlockSpan) -> bool:
        return self._lists(peer, span) and self._clock() - self._read_at_s <= _FRESH_S

    def _lists(self, peer: str, span: BlockSpan) -> bool:
        view = self._view
        return view is not None and all(
            block < view.num_blocks and peer in view.blocks[block] for block in span
        )

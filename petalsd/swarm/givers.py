"""Who may hand sessions to us: servers of the same blocks, as far as the directory tells."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from petalsd.errors import BadRequest
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
        self._read_at_s = -math.inf
        self._turn = asyncio.Lock()

    async def check(self, peer: str, span: BlockSpan) -> None:
        """UnknownGiver unless ``peer`` is listed under all blocks of ``span``; errors as of ``read``.

        In any state: a giver has said OFFLINE of the blocks that it leaves.
        """
        async with self._turn:
            is_known, age_s = self._lists(peer, span), self._clock() - self._read_at_s
            if age_s > (_FRESH_S if is_known else _PAUSE_S):
                self._view, self._read_at_s = await self._read(), self._clock()
                is_known = self._lists(peer, span)
        if not is_known:
            raise UnknownGiver(
                "giver", peer, f"the directory does not list this peer as a server of blocks {span}"
            )

    def _lists(self, peer: str, span: BlockSpan) -> bool:
        view = self._view
        return view is not None and all(
            block < view.num_blocks and peer in view.blocks[block] for block in span
        )

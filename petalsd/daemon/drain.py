"""Letting running sessions finish, here or elsewhere: a wait with a deadline that can be cut short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from petalsd.daemon.parts import ServingEngine, SwarmMember
from petalsd.errors import DeadlineExceeded, SwarmError
from petalsd.log import error_fields
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_POLL_S = 0.1
_REPORT_PERIOD_S = 10.0
_HAND_OVER_PERIOD_S = 5.0
_LAST_WORD_S = 1.0  # for the hand-over that took the last session


@dataclass(slots=True)
class Hold:
    """A wish that the daemon drains and stays so: set from outside, obeyed by the serving task.

    asked       drain; ``deadline_s`` None is the configured one
    begun       OFFLINE is announced and new sessions are refused
    resumed     serve again
    """

    deadline_s: float | None = None
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)


class Drain:
    """One drain; its deadline may be set anew while it goes on. Work on blocks of ``kept`` alone is left aside.

    Sessions that another server takes go on there; the others have until the deadline to finish.

    ``abandoned``: sessions and passes that were left when it was over; None before.
    """

    def __init__(
        self,
        engine: ServingEngine,
        member: SwarmMember,
        deadline_s: float,
        kept: BlockSpan | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._member = member
        self._kept = kept
        self._clock = clock
        self._end_s = clock() + deadline_s
        self._is_over = asyncio.Event()
        self.abandoned: int | None = None

    @property
    def left(self) -> int:
        """Sessions and passes that it waits for."""
        return self._engine.work_outside(self._kept)

    @property
    def deadline_left_s(self) -> float:
        return max(0.0, self._end_s - self._clock())

    def set_deadline(self, deadline_s: float) -> None:
        """Counted from now."""
        self._end_s = self._clock() + deadline_s

    async def wait(self, cut_short: asyncio.Event) -> int:
        """Until no session and no pass is left, the deadline is over or ``cut_short`` is set; what is left."""
        handing_over = asyncio.create_task(self._hand_over(), name="hand-over")
        try:
            self.abandoned = await self._outlast(cut_short)
            self._is_over.set()
            if not self.abandoned:
                await asyncio.wait({handing_over}, timeout=_LAST_WORD_S)
        finally:
            handing_over.cancel()
            (failure,) = await asyncio.gather(handing_over, return_exceptions=True)
            if isinstance(failure, Exception):  # sessions have had their time here, and nothing else is lost
                log.error("hand_over_broke", **error_fields(failure))
        return self.abandoned

    async def _hand_over(self) -> None:
        """Those that another server takes need not be waited for; as well as the swarm allows.

        Again and again: a taker that was full has room once clients have come for what it took.
        """
        while self.left:
            try:
                moved = await self._member.hand_over(self._kept, self.deadline_left_s)
            except (SwarmError, DeadlineExceeded) as error:
                log.warning("hand_over_failed", **error_fields(error))
            else:
                say = log.info if moved else log.debug
                say("handed_over", sessions=moved, left=self.left)
            await _pause(self._is_over, _HAND_OVER_PERIOD_S)

    async def _outlast(self, cut_short: asyncio.Event) -> int:
        report_s = self._clock()
        while (left := self.left) and not cut_short.is_set() and self.deadline_left_s > 0:
            if self._clock() >= report_s:
                report_s = self._clock() + _REPORT_PERIOD_S
                log.info("draining", sessions_and_passes=left, left_s=round(self.deadline_left_s, 1))
            await _pause(cut_short, min(_POLL_S, self.deadline_left_s))
        return left


def open_work(engine: ServingEngine) -> int:
    """Sessions and passes that are under way."""
    return engine.work_outside(None)


async def _pause(cut_short: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await cut_short.wait()
    except TimeoutError:
        pass

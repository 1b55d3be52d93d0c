"""Letting running sessions finish: a wait with a deadline that can be cut short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from petalsd.daemon.parts import ServingEngine
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_POLL_S = 0.1
_REPORT_PERIOD_S = 10.0


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

    ``abandoned``: sessions and passes that were left when it was over; None before.
    """

    def __init__(
        self,
        engine: ServingEngine,
        deadline_s: float,
        kept: BlockSpan | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._kept = kept
        self._clock = clock
        self._end_s = clock() + deadline_s
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
        report_s = self._clock()
        while (left := self.left) and not cut_short.is_set() and self.deadline_left_s > 0:
            if self._clock() >= report_s:
                report_s = self._clock() + _REPORT_PERIOD_S
                log.info("draining", sessions_and_passes=left, left_s=round(self.deadline_left_s, 1))
            await _pause(cut_short, min(_POLL_S, self.deadline_left_s))
        self.abandoned = left
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

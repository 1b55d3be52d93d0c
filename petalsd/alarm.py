"""A deadline that is moved often and hardly ever missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_RESOLUTION_S = 0.001  # of uvloop's timers, which may fire that much too early


class Alarm:
    """Calls ``ring`` when the time that was last set is over; belongs to the running loop.

    A timer of the loop costs ten times what it costs to look at the clock, and every decode step has several
    deadlines. So the timer stays where it is when the deadline moves on, and finds out when it fires.
    """

    __slots__ = ("_due_s", "_loop", "_ring", "_timer")

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._due_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, delay_s: float) -> None:
        """Ring after ``delay_s`` seconds, and not at the time that was set before."""
        due_s = self._due_s = self._loop.time() + delay_s
        timer = self._timer
        if timer is None:
            self._timer = self._loop.call_at(due_s, self._look)
        elif due_s < timer.when():
            timer.cancel()
            self._timer = self._loop.call_at(due_s, self._look)

    def clear(self) -> None:
        """Do not ring until it is set again."""
        self._due_s = None

    def close(self) -> None:
        """Do not ring, and leave nothing in the loop."""
        self._due_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        due_s, self._timer = self._due_s, None
        if due_s is None:
            return
        if due_s > self._loop.time() + _RESOLUTION_S:
            self._timer = self._loop.call_at(due_s, self._look)
            return
        self._due_s = None
        self._ring()

"""A deadline that moves: when it rings, and that it does not where it was moved, cleared or closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from petalsd.alarm import Alarm

Run = Callable[[Coroutine[Any, Any, None]], None]

# Timers of uvloop count in milliseconds and may be that much early.
RESOLUTION_S = 0.002


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """The client's loop is of the one kind, the daemon's of the other."""
    return request.param


class Bell:
    """An alarm that counts its rings."""

    def __init__(self) -> None:
        self.alarm = Alarm(self._ring)
        self.num_rings = 0
        self._rang = asyncio.Event()
        self._made_s = asyncio.get_running_loop().time()

    def _ring(self) -> None:
        self.num_rings += 1
        self._rang.set()

    async def wait(self) -> float:
        """Until it rings; the seconds since it was made."""
        await self._rang.wait()
        return asyncio.get_running_loop().time() - self._made_s


async def pause(seconds: float) -> None:
    """Until an alarm rings that was set now."""
    other = Bell()
    other.alarm.set(seconds)
    await other.wait()


def test_it_rings_once_and_not_early(run: Run) -> None:
    async def scene() -> None:
        bell = Bell()
        bell.alarm.set(0.03)
        assert await bell.wait() >= 0.03 - RESOLUTION_S
        await pause(0.05)
        assert bell.num_rings == 1

    run(scene())


def test_moving_it_on_keeps_it_quiet(run: Run) -> None:
    """The timer of the first deadline fires in between, and finds that it is not over."""

    async def scene() -> None:
        bell = Bell()
        bell.alarm.set(0.02)
        bell.alarm.set(0.08)
        assert await bell.wait() >= 0.08 - RESOLUTION_S

    run(scene())


def test_a_nearer_deadline_counts(run: Run) -> None:
    async def scene() -> None:
        bell = Bell()
        bell.alarm.set(60.0)
        bell.alarm.set(0.02)
        assert await bell.wait() < 30.0

    run(scene())


@pytest.mark.parametrize("quiet", [Alarm.clear, Alarm.close])
def test_what_was_cleared_or_closed_does_not_ring(run: Run, quiet: Callable[[Alarm], None]) -> None:
    """It can be set again after."""

    async def scene() -> None:
        bell = Bell()
        bell.alarm.set(0.01)
        quiet(bell.alarm)
        await pause(0.05)
        assert bell.num_rings == 0
        bell.alarm.set(0.01)
        await bell.wait()

    run(scene())

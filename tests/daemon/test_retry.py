"""Trying again, and work that can be abandoned."""

from __future__ import annotations

import asyncio
import threading

import pytest

from petalsd.daemon.backoff import Backoff, retry
from petalsd.daemon.detached import Abandoned, AbandonSwitch, run_detached

QUICK = Backoff(attempts=3, first_delay_s=0.0, max_delay_s=0.0)


def test_delays_double_up_to_the_bound() -> None:
    """After each failure the delay doubles, up to max_delay_s."""
    backoff = Backoff(attempts=9, first_delay_s=2.0, max_delay_s=10.0)
    assert [backoff.delay_s(failures) for failures in (1, 2, 3, 4)] == [2.0, 4.0, 8.0, 10.0]


async def test_temporary_errors_are_tried_again_a_bounded_number_of_times() -> None:
    """Three attempts: two failures are reported, the third one is raised."""
    failures: list[str] = []

    async def work() -> None:
        raise OSError(f"try {len(failures) + 1}")

    with pytest.raises(OSError, match="try 3"):
        await retry(work, QUICK, (OSError,), lambda error, _: failures.append(str(error)))
    assert failures == ["try 1", "try 2"]


async def test_other_errors_are_not_tried_again() -> None:
    """An error outside the temporary ones ends the attempts at once."""
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)
        raise ValueError("permanent")

    with pytest.raises(ValueError, match="permanent"):
        await retry(work, QUICK, (OSError,), lambda error, delay_s: None)
    assert calls == [1]


async def test_detached_work_gives_its_result_or_error() -> None:
    """The result comes back to the loop; so does an exception."""

    def failing(switch: AbandonSwitch) -> int:
        raise ValueError("inside")

    assert await run_detached(lambda switch: threading.current_thread().name, "loader") == "loader"
    with pytest.raises(ValueError, match="inside"):
        await run_detached(failing, "loader")


async def test_cancelled_work_is_abandoned_and_learns_of_it() -> None:
    """Cancelling returns at once although the work still runs; its next check ends it."""
    entered, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work(switch: AbandonSwitch) -> None:
        entered.set()
        go_on.wait(30)
        try:
            switch.check()
        except Abandoned:
            ended.set()
            raise

    waiting = asyncio.create_task(run_detached(work, "loader"))
    assert await asyncio.to_thread(entered.wait, 30)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not ended.is_set()
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 30)

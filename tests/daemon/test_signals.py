"""Real signals to flags."""

from __future__ import annotations

import asyncio
import os
import signal

from petalsd.daemon.signals import Signals


async def test_the_first_stop_signal_drains_and_the_second_stops_now() -> None:
    """SIGTERM asks for a drain; any second stop signal asks to stop at once."""
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(signals.stop.wait(), 5)
        assert not signals.now.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(signals.now.wait(), 5)


async def test_hangup_asks_for_a_reload() -> None:
    """SIGHUP sets the reload flag and nothing else."""
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(signals.reload.wait(), 5)
        assert not signals.stop.is_set()


async def test_the_handlers_are_taken_back() -> None:
    """After the context SIGTERM and SIGHUP do what they did before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with Signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before

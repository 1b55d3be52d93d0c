"""The life of a bootstrap node, over a node that does as the test says."""

from __future__ import annotations

import asyncio

import pytest

from petalsd.daemon.backoff import Backoff
from petalsd.daemon.bootstrap.daemon import BootstrapDaemon
from petalsd.daemon.signals import Signals
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import ConfigError, DeadlineExceeded, SwarmError
from petalsd.types import DaemonState
from tests.waiting import eventually

QUICK = Backoff(attempts=3, first_delay_s=0.0, max_delay_s=0.0)


class Node:
    """``problems`` are raised by the next starts; ``broken`` is set to have it fail."""

    peer_id = "Qm"

    def __init__(self, *problems: Exception) -> None:
        self.problems = list(problems)
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.calls: list[str] = []
        self.is_mute = False
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def start(self) -> None:
        self.calls.append("start")
        await self.may_start.wait()
        self.broken = asyncio.get_running_loop().create_future()
        if self.problems:
            raise self.problems.pop(0)

    async def stop(self) -> None:
        self.calls.append("stop")

    async def until_failed(self) -> str:
        return await asyncio.shield(self.broken)

    async def maddrs(self) -> list[str]:
        if self.is_mute:
            raise SwarmError("the libp2p daemon cannot be asked")
        return []

    async def renew(self) -> None: ...

    async def is_in_touch(self) -> bool:
        return True

    async def refresh(self) -> None:
        self.calls.append("refresh")
        raise DeadlineExceeded("reading in the DHT took longer than 30 s")


class Life:
    def __init__(self, *problems: Exception) -> None:
        self.node, self.signals, self.board = Node(*problems), Signals(), WarningBoard()
        self.daemon = BootstrapDaemon(self.node, self.signals, self.board, QUICK, health_period_s=0.01)
        self.states: list[DaemonState] = []
        self.daemon.lifecycle.subscribe(lambda old, new: self.states.append(new))
        self.run = asyncio.create_task(self.daemon.run())

    async def online(self, times: int = 1) -> None:
        await eventually(lambda: self.states.count(DaemonState.ONLINE) == times, interval_s=0.005)

    async def stop(self) -> None:
        self.signals.stop.set()
        await asyncio.wait_for(self.run, 5)


async def test_it_is_there_until_it_is_told_to_stop() -> None:
    life = Life()
    await life.online()
    await life.stop()
    assert life.states == [DaemonState.ONLINE, DaemonState.STOPPING, DaemonState.STOPPED]
    assert life.node.calls == ["start", "stop"]


@pytest.mark.parametrize("is_mute", [False, True], ids=["died", "hangs"])
async def test_a_libp2p_daemon_that_fails_is_replaced(is_mute: bool) -> None:
    """What is wrong is shown while it lasts."""
    life = Life()
    await life.online()
    life.node.may_start.clear()
    life.node.problems = [SwarmError("no memory")]
    if is_mute:
        life.node.is_mute = True
    else:
        life.node.broken.set_result("it was killed")
    await eventually(lambda: life.board.active(), interval_s=0.001)
    life.node.is_mute = False
    life.node.may_start.set()
    await life.online(times=2)
    assert life.states == [DaemonState.ONLINE, DaemonState.STARTING, DaemonState.ONLINE]
    assert not life.board.active()
    await life.stop()


async def test_a_start_that_fails_for_long_ends_it() -> None:
    """Whoever supervises it restarts it."""
    life = Life(*[SwarmError("no such address")] * 3)
    with pytest.raises(SwarmError, match="no such address"):
        await life.run
    assert life.states == [DaemonState.FAILED]
    assert life.node.calls == ["start"] * 3 + ["stop"]
    assert [one.code for one in life.board.active()] == ["join_failed"]


async def test_what_trying_again_does_not_mend_ends_it_at_once() -> None:
    life = Life(ConfigError("the key is damaged"))
    with pytest.raises(ConfigError):
        await life.run
    assert life.node.calls == ["start", "stop"]


async def test_a_refresh_that_fails_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalsd.daemon.bootstrap.daemon._REFRESH_PERIOD_S", 0.0)
    life = Life()
    await eventually(lambda: life.node.calls.count("refresh") > 2, interval_s=0.005)
    await life.stop()
    assert life.states == [DaemonState.ONLINE, DaemonState.STOPPING, DaemonState.STOPPED]

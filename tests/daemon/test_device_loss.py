"""A lost device ends the process: without a ping, after OFFLINE, in the state FAILED."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalsd.cli.exit_codes import EXIT_DEVICE_LOST, exit_code_of
from petalsd.errors import DeviceLost
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan, DaemonState
from tests.daemon.fakes import PEER, FakeEngine, Stage
from tests.daemon.test_daemon import DEADLINE_S, until_online
from tests.daemon.test_watchdog import Scene


async def test_the_daemon_ends_when_the_device_is_lost() -> None:
    """Nothing is tried again in this process; the swarm is told first."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.engine.lose_device()
    with pytest.raises(DeviceLost) as caught:
        await asyncio.wait_for(running, DEADLINE_S)
    assert exit_code_of(caught.value) == EXIT_DEVICE_LOST
    assert stage.daemon.lifecycle.state is DaemonState.FAILED
    assert set(stage.swarm.states_of(PEER).values()) == {ServerState.OFFLINE}
    assert stage.calls.count("engine starts") == 1


async def test_a_device_that_is_lost_while_blocks_load() -> None:
    """On the loading thread it is torch's own error that comes up."""
    stage = Stage("blocks.span=0:2")
    stage.reader.failures.append(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    with pytest.raises(DeviceLost, match="719"):
        await asyncio.wait_for(stage.run(), DEADLINE_S)
    assert stage.daemon.lifecycle.state is DaemonState.FAILED
    assert stage.daemon.span == BlockSpan(0, 2)


async def test_no_ping_is_earned_by_a_lost_device() -> None:
    """Neither a canary nor work that moved before counts; the process is not asked to dump its stacks either."""
    scene = Scene(FakeEngine([]))
    scene.engine.lose_device()
    await asyncio.wait_for(scene.watchdog.run(), DEADLINE_S)
    assert (scene.notifier.pings, scene.notifier.triggers) == (0, 0)
    assert scene.codes() == ["device_lost"]

"""Drain, resume and move as an administrator asks for them, on a daemon made of fakes."""

from __future__ import annotations

import asyncio

import pytest

from petalsd.daemon.supervisor import Cause, Departure
from petalsd.errors import Conflict, SwarmError
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan, DaemonState
from tests.daemon.fakes import OTHER, PEER, Stage
from tests.daemon.test_daemon import DEADLINE_S, stopped, until_online


async def test_a_drain_waits_for_sessions_and_a_resume_serves_again() -> None:
    """OFFLINE before anything is refused; DRAINED when the last session ended; the same blocks come back."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.engine.sessions = 1
    stage.calls.clear()
    await stage.daemon.hold(None)
    assert stage.calls == ["announce OFFLINE 0:2", "refuse"]
    assert stage.daemon.lifecycle.state is DaemonState.DRAINING
    drained = stage.until(DaemonState.DRAINED)
    stage.engine.sessions = 0
    await asyncio.wait_for(drained, DEADLINE_S)
    stage.calls.clear()
    await stage.daemon.release()
    assert stage.calls == ["admit", "announce ONLINE 0:2"]
    assert stage.daemon.lifecycle.state is DaemonState.ONLINE
    await stopped(stage, running)


async def test_a_resume_ends_a_drain_that_goes_on() -> None:
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.engine.sessions = 1
    await stage.daemon.hold(None)
    await stage.daemon.release()
    assert stage.daemon.lifecycle.state is DaemonState.ONLINE
    assert stage.engine.sessions == 1
    assert "sessions end" not in " ".join(stage.calls)
    await stopped_with_sessions(stage, running)


async def test_at_the_deadline_sessions_are_told_why() -> None:
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.engine.sessions = 2
    drained = stage.until(DaemonState.DRAINED)
    await stage.daemon.hold(0.05)
    await asyncio.wait_for(drained, DEADLINE_S)
    assert "sessions end: the server's drain reached its deadline" in stage.calls
    await stopped(stage, running)


async def test_a_second_drain_may_set_the_deadline_anew() -> None:
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.engine.sessions = 1
    drained = stage.until(DaemonState.DRAINED)
    await stage.daemon.hold(600)
    await stage.daemon.hold(None)
    assert stage.daemon.drain is not None
    assert stage.daemon.drain.deadline_left_s > 500
    await stage.daemon.hold(0.05)
    await asyncio.wait_for(drained, DEADLINE_S)
    await stage.daemon.hold(None)
    assert stage.daemon.lifecycle.state is DaemonState.DRAINED
    await stopped(stage, running)


async def test_a_stop_while_draining_keeps_the_deadline() -> None:
    """The stop goes on with what is left of the drain's time, not with the configured one."""
    stage = Stage("blocks.span=0:2", "daemon.drain_deadline_s=600")
    running = await until_online(stage)
    stage.engine.sessions = 1
    await stage.daemon.hold(0.3)
    await stopped(stage, running)
    assert stage.daemon.lifecycle.state is DaemonState.STOPPED


async def test_what_makes_no_sense_now_is_refused() -> None:
    stage = Stage("blocks.span=0:2")
    with pytest.raises(Conflict, match="starting"):
        await stage.daemon.hold(None)
    with pytest.raises(Conflict, match="starting"):
        await stage.daemon.release()
    with pytest.raises(Conflict, match="starting"):
        await stage.daemon.move_to(None, "asked")
    running = await until_online(stage)
    await stage.daemon.release()
    await stopped(stage, running)


async def test_a_member_that_broke_while_drained_is_healed_by_the_resume() -> None:
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    await stage.daemon.hold(None)
    stage.member.failures["announce"] = [SwarmError("p2pd died")]
    await stage.daemon.release()
    assert stage.daemon.lifecycle.state is DaemonState.ONLINE
    assert stage.calls.count("join") == 2
    await stopped(stage, running)


async def test_a_move_goes_where_it_was_told() -> None:
    """To the blocks that were named, although others need it more; what it left is on record."""
    stage = Stage("blocks.count=2")
    running = await until_online(stage)
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(4, 8))
    online = stage.until(DaemonState.ONLINE)
    await stage.daemon.move_to(BlockSpan(5, 7), "somebody asked")
    assert stage.daemon.lifecycle.state is not DaemonState.ONLINE
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.swarm.states_of(PEER)[5] is ServerState.ONLINE
    await asyncio.sleep(0)
    assert stage.daemon.last_move is not None
    assert (stage.daemon.last_move.old, stage.daemon.last_move.new) == (BlockSpan(0, 2), BlockSpan(5, 7))
    assert stage.daemon.last_move.reason == "somebody asked"
    await stopped(stage, running)


async def stopped_with_sessions(stage: Stage, running: asyncio.Task[None]) -> None:
    """A stop that does not wait for sessions."""
    stage.signals.request_stop()
    stage.signals.request_stop()
    await asyncio.wait_for(running, DEADLINE_S)


async def test_a_move_may_be_asked_for_in_the_moment_of_coming_online() -> None:
    """Before the watch over the new span has begun: the wish is not lost."""
    stage = Stage("blocks.count=2")
    stage.supervisor.leave(Departure(Cause.REQUESTED, "at once"))
    departure = await asyncio.wait_for(
        stage.supervisor.until_departure(BlockSpan(0, 2), lambda num_blocks: True), DEADLINE_S
    )
    assert departure.reason == "at once"

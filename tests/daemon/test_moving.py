"""Moves of a daemon of fakes: what goes on serving, in which order the rest happens, and the way back."""

from __future__ import annotations

import asyncio
import time

import pytest

from petalsd.daemon.announcement import VERSION
from petalsd.daemon.lifecycle import DaemonState
from petalsd.daemon.plan import Demand
from petalsd.errors import Conflict, EngineError, SwarmError, WeightsError
from petalsd.swarm.placement.decision import OwnSpan, Verdict
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.daemon.fakes import OTHER, PEER, Stage
from tests.daemon.test_administration import administer, check
from tests.daemon.test_daemon import DEADLINE_S, stopped, until_online
from tests.waiting import eventually

OLD, NEW, KEPT = BlockSpan(0, 4), BlockSpan(2, 6), BlockSpan(2, 4)
ONLINE, JOINING, OFFLINE = ServerState.ONLINE, ServerState.JOINING, ServerState.OFFLINE


async def moving(stage: Stage) -> asyncio.Task[None]:
    """A daemon that serves 0:4 with a session on 2:4 and one on 0:4, and has begun to move to 2:6."""
    running = await until_online(stage)
    stage.engine.open_spans = [KEPT, OLD]
    stage.calls.clear()
    await stage.daemon.move_to(NEW, "the test wants it")
    return running


def calls(stage: Stage) -> list[str]:
    return [call for call in stage.calls if call != "self-test"]


async def draining_all(stage: Stage) -> None:
    """Asked to stop, it says of all blocks that they are OFFLINE, and sessions are still there."""
    draining = stage.until(DaemonState.DRAINING)
    stage.signals.request_stop()
    await asyncio.wait_for(draining, DEADLINE_S)
    await eventually(lambda: "refuse" in stage.calls)
    assert set(stage.swarm.states_of(PEER).values()) == {OFFLINE}
    assert "engine drops" not in stage.calls


async def test_what_stays_serves_on_while_the_rest_is_exchanged() -> None:
    """New blocks are loaded beside the old ones, and serve before sessions are waited for; those on what stays
    are still there at the end."""
    stage = Stage("blocks.count=4")
    administration = administer(stage)
    running = await moving(stage)
    await eventually(lambda: stage.member.handed_over == [NEW])
    assert stage.calls == [
        "announce JOINING 4:6, ONLINE 0:4", "load 4", "load 5",
        "engine changes to 0:6", "self-test", "announce ONLINE 0:6",
        "engine keeps 2:6", "announce OFFLINE 0:2, ONLINE 2:6",
    ]  # fmt: skip
    assert stage.swarm.states_of(PEER) == dict.fromkeys(range(2), OFFLINE) | dict.fromkeys(NEW, ONLINE)
    progress, status = administration.progress("rebalance"), administration.status()
    check(progress, "progress")
    assert (progress.state, progress.sessions_left, progress.done) == ("rebalancing", 1, False)
    assert progress.deadline_left_s is not None and 50 < progress.deadline_left_s <= 60
    assert status.summary == "Rebalancing: blocks 2:6 go on serving, sessions on blocks 0:2 finish"
    assert administration.is_ready
    with pytest.raises(Conflict, match="rebalancing"):
        await administration.drain(None)
    stage.calls.clear()
    online = stage.until(DaemonState.ONLINE)
    stage.engine.open_spans.remove(OLD)
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.calls == ["engine changes to 2:6", "self-test", "announce ONLINE 2:6"]
    assert stage.engine.open_spans == [KEPT] and stage.daemon.span == NEW
    assert sorted(stage.daemon._parts.loader.blocks) == list(NEW)
    await eventually(lambda: administration.progress("rebalance").outcome == "blocks 2:6 are served")
    stage.engine.open_spans.clear()
    await stopped(stage, running)


async def test_sessions_on_left_blocks_have_the_time_of_a_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takers are asked again until the deadline; then those that nobody took are ended, the others are not."""
    monkeypatch.setattr("petalsd.daemon.drain._HAND_OVER_PERIOD_S", 0.01)
    stage = Stage("blocks.count=4", "daemon.drain_deadline_s=0.05")
    stage.member.failures["hand_over"] = [SwarmError("the directory cannot be read")]
    running = await moving(stage)
    online = stage.until(DaemonState.ONLINE)
    await asyncio.wait_for(online, DEADLINE_S)
    assert "sessions end: the server moved to blocks 2:6" in stage.calls
    assert stage.member.handed_over[:3] == [NEW, NEW, NEW]
    assert stage.engine.open_spans == [KEPT]
    stage.engine.open_spans.clear()
    await stopped(stage, running)


async def test_a_directory_that_stores_nothing_just_then_ends_nothing() -> None:
    """The move goes on without its announcements; the next check says again what is served."""
    stage = Stage("blocks.count=4")
    running = await until_online(stage)
    stage.engine.open_spans = [KEPT]
    stage.member.failures["announce"] = [SwarmError("no node stored it")] * 2
    online = stage.until(DaemonState.ONLINE)
    await stage.daemon.move_to(NEW, "the test wants it")
    await asyncio.wait_for(online, DEADLINE_S)
    assert (stage.engine.span, stage.engine.open_spans) == (NEW, [KEPT])
    assert "part" not in stage.calls
    stage.supervisor.check_now()
    await eventually(
        lambda: stage.swarm.states_of(PEER) | dict.fromkeys(NEW, ONLINE) == stage.swarm.states_of(PEER)
    )
    stage.engine.open_spans.clear()
    await stopped(stage, running)


async def test_without_room_the_left_blocks_go_before_the_new_ones_come() -> None:
    stage = Stage("blocks.count=4")
    stage.has_room = False
    running = await moving(stage)
    await eventually(lambda: stage.daemon.drain is not None)
    online = stage.until(DaemonState.ONLINE)
    stage.engine.open_spans.remove(OLD)
    await asyncio.wait_for(online, DEADLINE_S)
    assert calls(stage) == [
        "announce JOINING 4:6, ONLINE 0:4",
        "engine keeps 2:4", "announce OFFLINE 0:2, JOINING 4:6, ONLINE 2:4", "engine changes to 2:4",
        "load 4", "load 5", "engine changes to 2:6", "announce ONLINE 2:6",
    ]  # fmt: skip
    stage.engine.open_spans.clear()
    await stopped(stage, running)


@pytest.mark.parametrize("fault", ["download", "memory", "block", "block without room"])
async def test_a_failed_move_leaves_the_old_span_serving(fault: str) -> None:
    """The old span is announced and served whole, a warning says why, and the next check stays calm."""
    stage = Stage("blocks.count=4", "blocks.balance_quality=2")
    administration = administer(stage)
    running = await until_online(stage)
    stage.has_room = fault != "block without room"
    stage.calls.clear()
    if fault == "download":
        stage.reader.failures = [WeightsError("connection lost")] * 3
    elif fault == "memory":
        stage.reader.load_block = _out_of_memory  # type: ignore[method-assign]
    else:
        stage.engine.failures = [EngineError("not finite")]
    online = stage.until(DaemonState.ONLINE)
    await stage.daemon.move_to(NEW, "the test wants it")
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.swarm.states_of(PEER) | dict.fromkeys(OLD, ONLINE) == stage.swarm.states_of(PEER)
    assert (stage.daemon.span, stage.engine.span, stage.daemon.last_move) == (OLD, OLD, None)
    assert stage.calls[-2:] == ["engine keeps all", "announce ONLINE 0:4"]
    assert sorted(stage.daemon._parts.loader.blocks) == list(OLD)
    assert [one.code for one in stage.board.active() if one.code == "move_failed"]
    progress = administration.progress("rebalance")
    check(progress, "progress")
    assert progress.error is not None and "blocks 2:6 cannot be served" in progress.error.message
    stage.supervisor._check_now.set()
    await eventually(lambda: not stage.supervisor._check_now.is_set())
    assert stage.daemon.lifecycle.state is DaemonState.ONLINE
    await stopped(stage, running)


def _out_of_memory(index: int) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


async def test_another_number_of_blocks() -> None:
    """Fewer keep the pool and the sessions on what stays, more do so as far as it goes; then all must leave."""
    stage = Stage("blocks.count=4", "daemon.drain_deadline_s=0.05")
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(3, 8))
    running = await until_online(stage)
    stage.engine.open_spans = [BlockSpan(1, 2)]
    for count, span, sessions in (3, BlockSpan(0, 3), 1), (5, BlockSpan(0, 5), 1), (6, BlockSpan(0, 6), 0):
        stage.calls.clear()
        online = stage.until(DaemonState.ONLINE)
        stage.overrides.append(f"blocks.count={count}")
        stage.signals.reload.set()
        await asyncio.wait_for(online, DEADLINE_S)
        assert (stage.engine.span, len(stage.engine.open_spans)) == (span, sessions)
    assert stage.member.handed_over[-1] is None
    assert stage.calls.index("sessions end: the server's drain reached its deadline") < stage.calls.index(
        "load 5"
    )
    await stopped(stage, running)


async def test_a_cache_that_was_made_for_fewer_blocks_is_made_anew_when_nobody_uses_it() -> None:
    """Until then sessions use it; the blocks that are loaded stay so."""
    stage = Stage("blocks.count=5")
    stage.engine.open_spans = [BlockSpan(1, 2)]
    running = await until_online(stage)
    stage.calls.clear()
    stage.supervisor.check_now()
    await eventually(lambda: stage.calls == ["self-test"])
    loading, online = stage.until(DaemonState.LOADING), stage.until(DaemonState.ONLINE)
    stage.engine.open_spans.clear()
    stage.supervisor.check_now()
    await asyncio.wait_for(loading, DEADLINE_S)
    stage.max_blocks = 5
    await asyncio.wait_for(online, DEADLINE_S)
    assert "engine drops" in stage.calls and "engine loads" in stage.calls
    assert not any(call.startswith("load ") for call in stage.calls)
    await stopped(stage, running)


async def test_a_stop_in_mid_move_drains_everything() -> None:
    """All blocks go OFFLINE, new ones included, and the sessions have their deadline."""
    stage = Stage("blocks.count=4")
    running = await moving(stage)
    await eventually(lambda: stage.daemon.drain is not None)
    await draining_all(stage)
    stage.engine.open_spans.clear()
    await asyncio.wait_for(running, DEADLINE_S)
    assert stage.daemon.lifecycle.state is DaemonState.STOPPED


async def test_a_member_that_breaks_in_mid_move_is_replaced() -> None:
    stage = Stage("blocks.count=4")
    running = await moving(stage)
    await eventually(lambda: stage.daemon.drain is not None)
    online = stage.until(DaemonState.ONLINE)
    stage.member.broken.set()
    await asyncio.wait_for(online, DEADLINE_S)
    assert [call for call in stage.calls if call in ("part", "join")] == ["part", "join"]
    assert stage.engine.span == stage.daemon.span
    await stopped(stage, running)


async def test_blocks_are_given_up_and_taken_back() -> None:
    """With ``auto`` it is faster at the one that only it has; once the others have nobody it serves all again."""
    stage = Stage("blocks.count=auto")
    stage.swarm.records[PEER] = ServerRecord(
        ONLINE, 1.0, version=VERSION, network_rps=1e6, forward_rps=10.0, max_blocks=4
    )
    stage.swarm.put(OTHER, ONLINE, BlockSpan(1, 8), throughput=90.0)
    running = await until_online(stage)
    stage.calls.clear()
    plan = await administer(stage).plan(None)
    assert plan.proposed is not None and (plan.proposed.start, plan.proposed.end) == (0, 1)
    assert "faster at blocks 0:1" in plan.explanation
    await checked(stage)
    assert calls(stage) == [
        "engine keeps 0:1", "announce OFFLINE 1:4, ONLINE 0:1", "engine changes to 0:1", "announce ONLINE 0:1"
    ]  # fmt: skip
    assert (stage.daemon.span, sorted(stage.daemon._parts.loader.blocks)) == (BlockSpan(0, 1), [0])
    stage.calls.clear()
    stage.swarm.put(OTHER, OFFLINE, BlockSpan(1, 8))
    await checked(stage)
    assert calls(stage) == [
        "announce JOINING 1:4, ONLINE 0:1", "load 1", "load 2", "load 3",
        "engine changes to 0:4", "announce ONLINE 0:4",
    ]  # fmt: skip
    await stopped(stage, running)


async def checked(stage: Stage) -> None:
    """The next check, long after the last move, has led to another one."""
    online = stage.until(DaemonState.ONLINE)
    stage.supervisor._served_since -= 1000.0
    stage.supervisor.check_now()
    await asyncio.wait_for(online, DEADLINE_S)


async def test_no_turn_is_kept_for_a_server_that_came_a_moment_ago() -> None:
    """It would be the first to go, but will stay for a while: we go."""
    stage, first = Stage("blocks.count=4"), "Qm" + "0" * 44
    stage.swarm.put("Qm" + "c" * 44, ONLINE, BlockSpan(0, 8), throughput=1.0)
    for peer in (PEER, first):
        stage.swarm.put(peer, ONLINE, OLD, throughput=10.0)
    rebalancer, own = stage.daemon._parts.rebalancer, OwnSpan(PEER, OLD)

    async def verdict() -> Verdict:
        return rebalancer.decide(await stage.member.read_view(), own, 0.75, Demand(4, None)).verdict

    assert await verdict() is Verdict.WAITS
    stage.swarm.records[first] = ServerRecord(ONLINE, 10.0, version=VERSION, online_since=time.time())
    stage.swarm.put(first, ONLINE, OLD, throughput=10.0)
    assert await verdict() is Verdict.MOVE

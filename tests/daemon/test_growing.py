"""Daemons of fakes whose blocks come slowly: each serves as soon as it is there; and what may go wrong then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch

from petalsd.errors import WeightsError
from petalsd.status import Span
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan, DaemonState
from tests.daemon.fakes import OTHER, PEER, Stage
from tests.daemon.test_administration import administer, check
from tests.daemon.test_daemon import DEADLINE_S, stopped, until_online
from tests.daemon.test_moving import calls, checked, draining_all
from tests.waiting import eventually

ONLINE, JOINING, OFFLINE = ServerState.ONLINE, ServerState.JOINING, ServerState.OFFLINE


@pytest.fixture(autouse=True)
def _every_block_is_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalsd.daemon.span_loader.PART_S", 0.0)
    monkeypatch.setattr("petalsd.daemon.span_loader.PART_SHARE", 0.0)


def slow_at(stage: Stage, block: int) -> Callable[[], None]:
    """Loading ``block`` takes until the function that this returns is called."""
    gate = stage.reader.gates[block] = threading.Event()
    return gate.set


async def starting(stage: Stage, block: int) -> tuple[asyncio.Task[None], Callable[[], None]]:
    """A daemon that serves what comes before ``block`` in its order, for which it waits."""
    go_on = slow_at(stage, block)
    running = asyncio.create_task(stage.run())
    await eventually(lambda: ONLINE in stage.swarm.states_of(PEER).values())
    return running, go_on


async def test_the_first_blocks_serve_while_others_are_loaded() -> None:
    """It begins at the block that nobody has, and grows to both sides; a session on the first one stays."""
    stage = Stage("blocks.span=1:5")
    stage.swarm.put(OTHER, ONLINE, BlockSpan(0, 2))
    stage.swarm.put("Qm" + "c" * 44, ONLINE, BlockSpan(3, 8), throughput=2.0)
    administration = administer(stage)
    running, go_on = await starting(stage, 3)
    await eventually(lambda: "announce JOINING 3:5, ONLINE 1:3" in stage.calls)
    assert stage.calls[3:] == [
        "announce JOINING 1:5", "load 2", "engine loads", "self-test", "admit",
        "announce JOINING 1:2, JOINING 3:5, ONLINE 2:3",
        "load 1", "engine changes to 1:3", "self-test", "admit", "announce JOINING 3:5, ONLINE 1:3",
    ]  # fmt: skip
    stage.engine.open_spans = [BlockSpan(2, 3)]
    status = administration.status()
    check(status, "status")
    assert (status.state, status.span, status.served_span) == (
        "loading",
        Span(start=1, end=5),
        Span(start=1, end=3),
    )
    assert not administration.is_ready
    online = stage.until(DaemonState.ONLINE)
    go_on()
    await asyncio.wait_for(online, DEADLINE_S)
    assert calls(stage)[-4:] == ["load 4", "engine changes to 1:5", "admit", "announce ONLINE 1:5"]
    assert stage.engine.open_spans == [BlockSpan(2, 3)]
    assert administration.is_ready
    stage.engine.open_spans.clear()
    await stopped(stage, running)


async def test_blocks_that_come_fast_are_served_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalsd.daemon.span_loader.PART_S", 60.0)
    stage = Stage("blocks.span=0:4")
    running = await until_online(stage)
    assert [call for call in stage.calls if call.startswith("announce")] == [
        "announce JOINING 0:4", "announce ONLINE 0:4"
    ]  # fmt: skip
    await stopped(stage, running)


@pytest.mark.parametrize("error", [WeightsError("truncated"), torch.OutOfMemoryError("CUDA out of memory")])
async def test_what_is_online_serves_on_when_the_rest_cannot_be_loaded(error: Exception) -> None:
    """The rest goes OFFLINE with a warning; it is tried again in some checks' time, but what does not fit."""
    stage = Stage("blocks.count=4", "blocks.balance_quality=0")
    stage.reader.failing_blocks[2], stage.available_bytes = error, 1
    running = await until_online(stage)
    assert stage.swarm.states_of(PEER) == {0: ONLINE, 1: ONLINE, 2: OFFLINE, 3: OFFLINE}
    assert (stage.daemon.span, stage.engine.span) == (BlockSpan(0, 2), BlockSpan(0, 2))
    (warning,) = stage.board.active()
    expected = (
        "2 instead of 4" if stage.limit.most else "blocks 0:2 of 0:4 are served: weights_error: truncated"
    )
    assert warning.detail == expected
    stage.reader.failing_blocks.clear()
    stage.calls.clear()
    stage.supervisor._stay_until_s = 0.0
    if stage.limit.most:
        stage.supervisor.check_now()
        await eventually(lambda: "self-test" in stage.calls)
    else:
        await checked(stage)
        assert stage.daemon.span == BlockSpan(0, 4)
        assert not stage.board.active()
    await stopped(stage, running)


async def test_a_stop_drains_sessions_on_the_first_blocks() -> None:
    stage = Stage("blocks.span=0:4")
    running, go_on = await starting(stage, 1)
    stage.engine.open_spans = [BlockSpan(0, 1)]
    await draining_all(stage)
    stage.engine.open_spans.clear()
    go_on()
    await asyncio.wait_for(running, DEADLINE_S)
    assert stage.daemon.lifecycle.state is DaemonState.STOPPED


async def test_a_member_that_breaks_meanwhile_is_replaced() -> None:
    """Blocks that are loaded stay so."""
    stage = Stage("blocks.span=0:4")
    running, go_on = await starting(stage, 1)
    online = stage.until(DaemonState.ONLINE)
    stage.member.broken.set()
    await eventually(lambda: "part" in stage.calls)
    go_on()
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.calls.count("load 0") == 1
    assert stage.engine.span == BlockSpan(0, 4)
    await stopped(stage, running)


async def move_in_vain(stage: Stage, span: BlockSpan, failing: int) -> None:
    """Without room for new blocks beside the old ones, and without block ``failing``."""
    stage.has_room, stage.reader.failing_blocks[failing] = False, WeightsError("truncated")
    stage.calls.clear()
    online = stage.until(DaemonState.ONLINE)
    await stage.daemon.move_to(span, "the test wants it")
    await asyncio.wait_for(online, DEADLINE_S)


async def test_a_move_serves_new_blocks_one_by_one() -> None:
    """Without room the left ones go first; a failure then leaves as many blocks around what is online."""
    stage = Stage("blocks.count=4", "blocks.balance_quality=0")
    running = await until_online(stage)
    await move_in_vain(stage, BlockSpan(3, 7), 6)
    assert calls(stage) == [
        "announce JOINING 4:7, ONLINE 0:4",
        "engine keeps 3:4", "announce OFFLINE 0:3, JOINING 4:7, ONLINE 3:4", "engine changes to 3:4",
        "load 4", "engine changes to 3:5", "announce OFFLINE 0:3, JOINING 5:7, ONLINE 3:5",
        "load 5", "engine changes to 3:6", "announce OFFLINE 0:3, JOINING 6:7, ONLINE 3:6",
        "load 6", "load 6", "load 6",
        "load 2", "engine changes to 2:6", "engine keeps all", "announce ONLINE 2:6",
    ]  # fmt: skip
    assert (stage.daemon.span, stage.engine.span) == (BlockSpan(2, 6), BlockSpan(2, 6))
    assert stage.daemon.move_problem == "blocks 3:7 cannot be served: weights_error: truncated"
    await stopped(stage, running)


async def test_a_move_to_other_blocks_altogether_serves_the_first_of_them_early() -> None:
    """The cache is made for all of them; when the others fail, the span of before is served again."""
    stage = Stage("blocks.count=4", "blocks.balance_quality=0")
    running = await until_online(stage)
    await move_in_vain(stage, BlockSpan(4, 8), 5)
    assert [call for call in calls(stage) if call.startswith(("announce", "engine loads"))] == [
        "announce JOINING 4:8, ONLINE 0:4", "announce OFFLINE 0:4, JOINING 4:8",
        "engine loads", "announce OFFLINE 0:4, JOINING 5:8, ONLINE 4:5", "engine loads", "announce ONLINE 0:4",
    ]  # fmt: skip
    assert stage.planned_blocks == [4, 4, 4]
    assert stage.engine.span == BlockSpan(0, 4)
    await stopped(stage, running)


async def test_beside_the_old_blocks_everything_is_served_while_the_new_ones_come() -> None:
    stage = Stage("blocks.count=4", "blocks.balance_quality=0")
    running = await until_online(stage)
    stage.calls.clear()
    online = stage.until(DaemonState.ONLINE)
    await stage.daemon.move_to(BlockSpan(2, 6), "the test wants it")
    await asyncio.wait_for(online, DEADLINE_S)
    assert calls(stage) == [
        "announce JOINING 4:6, ONLINE 0:4",
        "load 4", "engine changes to 0:5", "announce JOINING 5:6, ONLINE 0:5",
        "load 5", "engine keeps 2:5", "announce OFFLINE 0:2, JOINING 5:6, ONLINE 2:5",
        "engine changes to 2:6", "announce ONLINE 2:6",
    ]  # fmt: skip
    await stopped(stage, running)

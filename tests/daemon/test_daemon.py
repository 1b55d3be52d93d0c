"""The life of a daemon made of fakes: the order of things, moves, failures, drains."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from petalsd.errors import DeadlineExceeded, EngineError, SwarmError, WeightsError
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan, DaemonState
from tests.daemon.fakes import OTHER, PEER, Stage
from tests.waiting import eventually

DEADLINE_S = 20


async def until_online(stage: Stage) -> asyncio.Task[None]:
    online = stage.until(DaemonState.ONLINE)
    running = asyncio.create_task(stage.run())
    await asyncio.wait({online, running}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
    assert online.done(), stage.calls
    return running


async def stopped(stage: Stage, running: asyncio.Task[None]) -> None:
    stage.signals.request_stop()
    await asyncio.wait_for(running, DEADLINE_S)


async def test_start_and_stop_order() -> None:
    """Nothing is announced before it is true; on the way out OFFLINE comes first and the parts go in order."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    assert stage.calls == [
        "prepare", "engine starts", "join", "announce JOINING 0:2", "load 0", "load 1", "engine loads",
        "self-test", "admit", "announce ONLINE 0:2",
    ]  # fmt: skip
    stage.calls.clear()
    await stopped(stage, running)
    assert stage.calls == ["announce OFFLINE 0:2", "refuse", "engine drops", "part", "engine stops"]
    assert stage.daemon.lifecycle.state is DaemonState.STOPPED


async def test_a_free_span_goes_where_the_swarm_is_weakest() -> None:
    """With a count only, the blocks that nobody serves are chosen."""
    stage = Stage("blocks.count=4")
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(0, 4))
    running = await until_online(stage)
    assert stage.swarm.states_of(PEER) == dict.fromkeys(range(4, 8), ServerState.ONLINE)
    await stopped(stage, running)
    assert stage.swarm.states_of(PEER) == dict.fromkeys(range(4, 8), ServerState.OFFLINE)


async def test_a_ghost_covers_nothing() -> None:
    """Blocks that only a crashed server's records name are taken before those records expire."""
    stage = Stage("blocks.count=4")
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(0, 4), throughput=9.0)
    stage.swarm.put("Qm" + "c" * 44, ServerState.ONLINE, BlockSpan(4, 8))
    stage.swarm.ghosts.add(OTHER)
    running = await until_online(stage)
    assert stage.daemon.span == BlockSpan(0, 4)
    await stopped(stage, running)


async def test_records_of_an_earlier_life_are_retracted_first() -> None:
    """A crash left ONLINE records elsewhere: they are declared OFFLINE before anything is announced."""
    stage = Stage("blocks.span=0:2")
    stage.swarm.put(PEER, ServerState.ONLINE, BlockSpan(4, 6))
    running = await until_online(stage)
    assert stage.calls.index("announce OFFLINE 4:6") < stage.calls.index("announce JOINING 0:2")
    await stopped(stage, running)


async def test_a_daemon_moves_into_a_gap() -> None:
    """When another server leaves a gap, the daemon refuses sessions, loads the gap's blocks and serves them."""
    stage = Stage("blocks.count=4", "blocks.balance_period_s=0.01")
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(4, 8))
    third = "Qm" + "c" * 44
    running = await until_online(stage)
    stage.calls.clear()
    online = stage.until(DaemonState.ONLINE)
    stage.swarm.put(third, ServerState.ONLINE, BlockSpan(0, 4), throughput=5.0)
    stage.swarm.put(OTHER, ServerState.OFFLINE, BlockSpan(4, 8))
    await asyncio.wait_for(online, DEADLINE_S)
    moves = [call for call in stage.calls if call != "self-test"]
    assert moves == [
        "announce JOINING 4:8, ONLINE 0:4", "load 4", "load 5", "load 6", "load 7",
        "engine keeps None", "announce OFFLINE 0:4, JOINING 4:8", "engine changes to 4:8", "announce ONLINE 4:8",
    ]  # fmt: skip
    await stopped(stage, running)


async def test_a_lost_record_is_announced_again() -> None:
    """A missing own record at a check is stored anew; nothing moves."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.calls.clear()
    stage.swarm.blocks[1].clear()
    stage.supervisor.check_now()
    await eventually(lambda: "announce ONLINE 0:2" in stage.calls)
    assert stage.daemon.lifecycle.state is DaemonState.ONLINE
    assert "refuse" not in stage.calls
    await stopped(stage, running)


async def test_a_dead_p2pd_is_replaced() -> None:
    """The member is stopped and started, the old record retracted, and the loaded blocks are used again."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.calls.clear()
    online = stage.until(DaemonState.ONLINE)
    stage.member.broken.set()
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.calls == [
        "refuse", "engine drops", "part", "join", "announce OFFLINE 0:2", "announce JOINING 0:2",
        "engine loads", "self-test", "admit", "announce ONLINE 0:2",
    ]  # fmt: skip
    await stopped(stage, running)


async def test_a_broken_engine_is_replaced() -> None:
    """A failed self-test at a check: OFFLINE, a new engine thread, the same blocks."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.calls.clear()
    online = stage.until(DaemonState.ONLINE)
    stage.engine.failures.append(EngineError("wrong"))
    stage.supervisor.check_now()
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.calls[:6] == [
        "self-test", "announce OFFLINE 0:2", "refuse", "engine drops", "engine stops", "engine starts"
    ]  # fmt: skip
    await stopped(stage, running)


async def test_an_engine_that_does_not_let_go_is_replaced() -> None:
    """A deadline that the engine misses while it takes blocks over is the engine's fault, not the swarm's."""
    stage = Stage("blocks.span=0:2")
    stage.engine.load_failures.append(DeadlineExceeded("the engine thread did not let go"))
    running = await until_online(stage)
    assert "engine stops" in stage.calls
    assert "part" not in stage.calls
    await stopped(stage, running)


async def test_an_engine_that_is_stuck_at_one_batch_is_replaced() -> None:
    """A busy engine is not given a canary; when one batch takes minutes it is broken."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.calls.clear()
    online = stage.until(DaemonState.ONLINE)
    stage.engine.busy_since_s = time.monotonic() - 1000
    stage.supervisor.check_now()
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.calls[0] == "announce OFFLINE 0:2"
    await stopped(stage, running)


async def test_a_load_that_keeps_failing_leaves_the_swarm() -> None:
    """After the last attempt OFFLINE is announced, everything stops, and the error comes out of run()."""
    stage = Stage("blocks.span=0:2")
    stage.reader.failures = [WeightsError("no such file")] * 3
    with pytest.raises(WeightsError):
        await asyncio.wait_for(stage.run(), DEADLINE_S)
    assert stage.calls[-5:] == ["announce OFFLINE 0:2", "refuse", "engine drops", "part", "engine stops"]
    assert stage.daemon.lifecycle.state is DaemonState.FAILED


async def test_a_swarm_that_cannot_be_joined_is_given_up() -> None:
    """Joining is tried a bounded number of times."""
    stage = Stage("blocks.span=0:2")
    stage.member.failures["join"] = [SwarmError("nobody there")] * 3
    with pytest.raises(SwarmError, match="nobody there"):
        await asyncio.wait_for(stage.run(), DEADLINE_S)
    assert stage.calls.count("join") == 3
    assert not any(call.startswith("announce") for call in stage.calls)


async def test_rounds_that_keep_failing_end_the_daemon() -> None:
    """An announcement that is never stored costs a new member each time, five times."""
    stage = Stage("blocks.span=0:2")
    stage.member.failures["announce"] = [SwarmError("refused")] * 100
    with pytest.raises(SwarmError, match="refused"):
        await asyncio.wait_for(stage.run(), DEADLINE_S)
    assert stage.calls.count("join") == 5
    assert stage.daemon.lifecycle.state is DaemonState.FAILED


async def test_a_stop_waits_for_sessions() -> None:
    """After OFFLINE the daemon waits until the last session has ended by itself."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.engine.sessions = 1
    draining = stage.until(DaemonState.DRAINING)
    stage.signals.request_stop()
    await asyncio.wait_for(draining, DEADLINE_S)
    await eventually(lambda: "refuse" in stage.calls)
    assert "engine drops" not in stage.calls
    stage.engine.sessions = 0
    await asyncio.wait_for(running, DEADLINE_S)
    assert stage.calls[-3:] == ["engine drops", "part", "engine stops"]


async def test_a_second_signal_ends_the_drain() -> None:
    """Sessions that are still open are cut when the second signal comes."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    stage.engine.sessions = 1
    draining = stage.until(DaemonState.DRAINING)
    stage.signals.request_stop()
    await asyncio.wait_for(draining, DEADLINE_S)
    stage.signals.request_stop()
    await asyncio.wait_for(running, DEADLINE_S)
    assert stage.daemon.lifecycle.state is DaemonState.STOPPED
    assert "sessions end: the server was told to stop at once" in stage.calls


async def test_the_drain_has_a_deadline() -> None:
    """With a deadline of 0 a stop waits for nobody."""
    stage = Stage("blocks.span=0:2", "daemon.drain_deadline_s=0")
    running = await until_online(stage)
    stage.engine.sessions = 1
    await stopped(stage, running)
    assert stage.engine.sessions == 0


async def test_a_stop_while_loading_says_offline() -> None:
    """The JOINING record is retracted although nothing was ever served."""
    stage = Stage("blocks.span=0:2")
    loading = asyncio.Event()
    stage.reader.load_block = lambda index: loading.set() or time.sleep(0.2)  # type: ignore[method-assign,func-returns-value]
    running = asyncio.create_task(stage.run())
    await eventually(loading.is_set)
    await stopped(stage, running)
    assert stage.swarm.states_of(PEER) == {0: ServerState.OFFLINE, 1: ServerState.OFFLINE}


async def test_a_reload_applies_a_new_span_and_refuses_a_bad_one() -> None:
    """SIGHUP: a changed span moves the daemon at once; one outside the model changes nothing."""
    stage = Stage("blocks.span=0:2")
    running = await until_online(stage)
    online = stage.until(DaemonState.ONLINE)
    stage.overrides[-1] = "blocks.span=1:3"
    stage.signals.reload.set()
    await asyncio.wait_for(online, DEADLINE_S)
    assert stage.calls.count("load 1") == 1
    stage.overrides[-1] = "blocks.span=7:9"
    stage.calls.clear()
    stage.signals.reload.set()
    await eventually(lambda: not stage.signals.reload.is_set())
    assert stage.settings.config.blocks.span == BlockSpan(1, 3)
    assert stage.calls == []
    await stopped(stage, running)


@pytest.mark.parametrize("blocks", ["blocks.span=0:2", "blocks.count=4"])
async def test_a_reload_with_nothing_to_gain_moves_nothing(
    capsys: pytest.CaptureFixture[str], blocks: str
) -> None:
    """Nothing is loaded or announced, and one line of the log says that the placement stays."""
    stage = Stage(blocks)
    stage.swarm.put(OTHER, ServerState.ONLINE, BlockSpan(4, 8))
    running = await until_online(stage)
    stage.calls.clear()
    capsys.readouterr()
    printed: list[str] = []
    stage.signals.reload.set()
    await eventually(lambda: printed.append(capsys.readouterr().out) or "placement" in "".join(printed))
    lines = [line for line in "".join(printed).splitlines() if "[debug" not in line]
    assert ["placement_unchanged" in line for line in lines] == [True]
    assert stage.calls == ["self-test"]
    await stopped(stage, running)


async def test_a_directory_that_cannot_be_read_moves_nobody() -> None:
    """A failed reading at a check is logged; serving goes on."""
    stage = Stage("blocks.count=2")
    running = await until_online(stage)
    stage.calls.clear()
    stage.member.failures["read_view"] = [SwarmError("timeout")]
    stage.supervisor.check_now()
    await eventually(lambda: not stage.member.failures["read_view"])
    assert stage.daemon.lifecycle.state is DaemonState.ONLINE
    assert "refuse" not in stage.calls
    await stopped(stage, running)


@pytest.mark.parametrize(("check_s", "period_s"), [(0.1, 10.0), (3.0, 150.0)])
async def test_checks_take_a_small_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch, check_s: float, period_s: float
) -> None:
    """Where the directory is large and a check takes long, there are fewer of them."""
    stage = Stage("blocks.balance_period_s=10")
    running = await until_online(stage)
    ticks = itertools.count(0.0, check_s)
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    monkeypatch.setattr(stage.supervisor._rng, "uniform", lambda low, high: high)
    stage.supervisor.check_now()

    def wait_s() -> float:
        return (stage.supervisor.next_check_monotonic_s or 0.0) - time.monotonic()

    await eventually(lambda: 2 * period_s - 5 < wait_s() <= 2 * period_s)
    await stopped(stage, running)

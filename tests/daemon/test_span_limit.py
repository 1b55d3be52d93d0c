"""A device that gives less memory than was counted on: fewer blocks are served, and it is said."""

from __future__ import annotations

import asyncio

import pytest
import structlog
import torch

from petalsd.daemon.sizing import MemoryNeed
from petalsd.daemon.span_limit import SpanLimit
from petalsd.daemon.supervisor import Cause
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import EngineError
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan, DaemonState
from tests.daemon.fakes import PEER, Stage
from tests.daemon.test_daemon import DEADLINE_S, stopped, until_online

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 436.00 MiB.\nGPU 0 has a total capacity of …"
)


def limit(available_bytes: int) -> SpanLimit:
    return SpanLimit(MemoryNeed(block_bytes=10, reserve_bytes=5), lambda: available_bytes, WarningBoard())


@pytest.mark.parametrize(("available_bytes", "most"), [(36, 3), (1000, 7), (15, 1)])
def test_as_many_as_the_memory_holds(available_bytes: int, most: int) -> None:
    """What is measured then counts, but a span that did not fit is never tried again."""
    lowered = limit(available_bytes)
    assert lowered.most is None
    departure = lowered.lower(BlockSpan(4, 12), FULL)
    assert (lowered.most, departure.cause) == (most, Cause.OUT_OF_MEMORY)


def test_no_block_fits() -> None:
    """Nothing can be served: that is said, and the process ends."""
    with pytest.raises(EngineError, match="does not hold one block of 3:4"):
        limit(1000).lower(BlockSpan(3, 4), FULL)
    with pytest.raises(EngineError, match="does not hold one block"):
        limit(14).lower(BlockSpan(0, 4), FULL)


async def test_a_full_device_while_blocks_load() -> None:
    """What fits is served; the block that does not is tried once more, and the swarm sees no more then."""
    stage = Stage("blocks.span=2:6")
    stage.reader.failing_blocks[4] = FULL
    stage.available_bytes = 2
    with structlog.testing.capture_logs() as logs:
        running = await until_online(stage)
    assert stage.swarm.states_of(PEER) == {
        2: ServerState.ONLINE, 3: ServerState.ONLINE, 4: ServerState.OFFLINE, 5: ServerState.OFFLINE,
    }  # fmt: skip
    assert [call for call in stage.calls if call.startswith(("load", "announce JOINING"))] == [
        "announce JOINING 2:6", "load 2", "load 3", "load 4", "announce JOINING 4:6, ONLINE 2:4", "load 4",
    ]  # fmt: skip
    (event,) = (event for event in logs if event["event"] == "span_reduced")
    assert (event["span"], event["num_blocks"]) == ("2:6", 2)
    assert event["error"] == "CUDA out of memory. Tried to allocate 436.00 MiB."
    (warning,) = stage.board.active()
    assert (warning.code, warning.detail) == ("span_reduced", "2 instead of 4")
    await stopped(stage, running)


async def test_a_full_device_when_the_cache_is_made() -> None:
    """All blocks were loaded, their cache does not fit; a check does not take the smaller span for a mistake."""
    stage = Stage("blocks.count=4", "blocks.balance_period_s=0.01")
    stage.engine.load_failures.append(FULL)
    running = await until_online(stage)
    assert stage.daemon.span is not None
    assert len(stage.daemon.span) == 3
    stage.supervisor.check_now()
    moved = stage.until(DaemonState.REBALANCING)
    await asyncio.sleep(0)
    assert not moved.done()
    await stopped(stage, running)


async def test_a_device_that_is_full_from_the_start() -> None:
    stage = Stage("blocks.count=1")
    stage.engine.load_failures.append(FULL)
    with pytest.raises(EngineError, match="does not hold one block"):
        await asyncio.wait_for(stage.run(), DEADLINE_S)
    assert stage.daemon.lifecycle.state is DaemonState.FAILED

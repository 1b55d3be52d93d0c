"""A real daemon that comes new into a swarm of real ones in which a server has just crashed."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalsd.swarm.node import Node, NodeOptions
from petalsd.types import BlockSpan
from tests.daemon.processes import launching
from tests.daemon.swarms import BUSY_S, Swarm
from tests.tiny_models import make_tiny
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(300)]

LOW, HIGH = BlockSpan(0, 2), BlockSpan(2, 4)


async def test_a_newcomer_takes_the_blocks_of_a_server_that_was_killed_a_moment_ago(tmp_path: Path) -> None:
    """It never heard from that one, and the only other server still announces how quickly it answers."""
    make_tiny("llama", tmp_path / "four", num_hidden_layers=4)
    node = Node(NodeOptions())
    await node.start()
    try:
        async with launching(tmp_path, node, tmp_path / "four") as launch:
            swarm = Swarm(node, "four-hf", 4)
            await swarm.start(
                [
                    launch(name, f"blocks.span={span}", "swarm.update_period_s=3600")
                    for name, span in (("low", LOW), ("high", HIGH))
                ]
            )
            (low,), (high,) = await swarm.at(LOW), await swarm.at(HIGH)

            async def is_praised() -> bool:
                return any(record and record.next_pings for record in await swarm.records(low))

            await eventually(is_praised, BUSY_S, 0.1)
            await high.kill()
            newcomer = launch("new", "blocks.count=2")
            await swarm.start([newcomer])
            assert high.peer in (await swarm.view()).blocks[HIGH.start], "its record has not expired"
            assert await swarm.at(HIGH) == [high, swarm.members[-1]]
    finally:
        await node.stop()

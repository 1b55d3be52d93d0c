"""Six real daemons share a model of three places: they spread, stay, and close the gap that a crash leaves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import PreTrainedModel

from petalsd.swarm.node import Node, NodeOptions
from petalsd.types import BlockSpan
from tests.daemon.generating import Generator
from tests.daemon.measured import total
from tests.daemon.processes import launching
from tests.daemon.swarms import BUSY_S, Member, Swarm
from tests.tiny_models import make_tiny
from tests.waiting import eventually

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

NUM_BLOCKS = 6
PLACES = LOW, MIDDLE, HIGH = BlockSpan(0, 2), BlockSpan(2, 4), BlockSpan(4, 6)
OPTIONS = (
    "blocks.count=2", "blocks.balance_period_s=2", "blocks.join_delay_s=1", "swarm.update_period_s=3600",
    "engine.kv_tokens=1024", "daemon.log_level=debug",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("models") / "six"
    return path, make_tiny("llama", path, num_hidden_layers=NUM_BLOCKS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm(
    tmp_path_factory: pytest.TempPathFactory, model: tuple[Path, PreTrainedModel]
) -> AsyncIterator[Swarm]:
    """Started at the same moment, each with a free choice of two blocks. Records outlast the tests."""
    node = Node(NodeOptions())
    await node.start()
    try:
        async with launching(tmp_path_factory.mktemp("swarm"), node, model[0]) as launch:
            swarm = Swarm(node, "six-hf", NUM_BLOCKS)
            await swarm.start([launch(f"d{number}", *OPTIONS) for number in range(6)])
            yield swarm
    finally:
        await node.stop()


@contextlib.asynccontextmanager
async def generating(swarm: Swarm, model: tuple[Path, PreTrainedModel]) -> AsyncIterator[list[Generator]]:
    """Four clients in the middle of a generation; at the end each output was that of transformers."""
    maddr = (await swarm.node.visible_maddrs())[0]
    generators = [Generator(model[0], maddr, model[1], seed) for seed in range(4)]
    running = [asyncio.create_task(generator.run()) for generator in generators]
    try:
        await asyncio.gather(*(generator.until_halfway() for generator in generators))
        yield generators
    finally:
        for generator in generators:
            generator.stop()
        await asyncio.gather(*map(Generator.over, generators, running))


async def test_who_start_together_spread(swarm: Swarm) -> None:
    """Two at each place, although all of them came to the same empty swarm."""
    assert await swarm.placement() == dict.fromkeys(PLACES, 2)


async def test_a_hangup_with_nothing_to_gain_changes_nothing(swarm: Swarm) -> None:
    """No block is loaded again, the record stays as it is, and one line of the journal says so."""
    member = swarm.members[0]

    async def has_renewed() -> bool:
        """As it does ten seconds after it came: the next time is in an hour.

        The third time that it stores, after JOINING and ONLINE; others read that before it is counted.
        """
        is_read = any(record is not None and record.next_pings for record in await swarm.records(member))
        return is_read and total(await member.metrics(), "dht_announcements_total") >= 3

    await eventually(has_renewed, BUSY_S, 0.2)
    series, records, mark = await member.metrics(), await swarm.records(member), member.mark
    member.daemon.send(signal.SIGHUP)
    await member.daemon.event("placement_unchanged", after=mark)
    await member.until_checked(2, mark)
    told = [event for event in member.daemon.events[mark:] if event.get("level") != "debug"]
    assert [event["event"] for event in told] == ["placement_unchanged"]
    assert await swarm.records(member) == records
    after = await member.metrics()
    for name in ("load_seconds_count", "dht_announcements_total", "rebalances_total", "moves_total"):
        assert total(after, name) == total(series, name), name
    assert total(after, "placement_checks_total") > total(series, "placement_checks_total")


async def test_two_that_crash_are_replaced_by_one_move(
    swarm: Swarm, model: tuple[Path, PreTrainedModel]
) -> None:
    """Both servers of a place are killed: the next check of one other fills the gap, and nobody else moves.

    Four clients in the middle of a generation get the tokens of transformers, then and afterwards.
    """
    lost = await swarm.at(MIDDLE)
    left = [member for member in swarm.members if member not in lost]
    await _until_all_checked(swarm.members, 1)
    async with generating(swarm, model) as clients:
        await asyncio.gather(*(member.kill() for member in lost))
        marks = [member.mark for member in left]
        for client in clients:
            client.release()
        await swarm.until_served(lost)
        await asyncio.gather(*(client.a_round_more() for client in clients))
        await _until_all_checked(left, 2)
    checks = {member.peer: member.checks(mark) for member, mark in zip(left, marks, strict=True)}
    (mover,) = [member for member in left if "move" in checks[member.peer]]
    assert checks[mover.peer].index("move") <= 1, "the first check may have begun before"
    assert sum("move" in verdict for peer in checks for verdict in checks[peer]) == 1
    assert [len(member.events("moved")) for member in left] == [int(member is mover) for member in left]
    assert (await swarm.placement(lost))[MIDDLE] == 1
    judged = await mover.daemon.event("move_judged")
    assert judged["realised_gain"] > 0


async def _until_all_checked(members: Sequence[Member], times: int) -> None:
    await asyncio.gather(*(member.until_checked(times, member.mark) for member in members))

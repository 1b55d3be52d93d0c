"""Daemons of fakes that claim blocks at the same moment as another server."""

from __future__ import annotations

from petalsd.errors import SwarmError
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan
from tests.daemon.fakes import OTHER, Stage
from tests.daemon.test_daemon import stopped, until_online

LOWER, HIGHER = "Qm" + "0" * 44, OTHER


class Rival:
    """Another newcomer, which we see only once we have announced: at our next looks it claims these, one by one.

    Without a claim the directory cannot be read any more.
    """

    def __init__(self, stage: Stage, peer: str, *claims: BlockSpan) -> None:
        self._stage, self._peer, self._claims = stage, peer, list(claims)
        self._read = stage.member.read_view
        stage.member.read_view = self.read_view  # type: ignore[method-assign]

    async def read_view(self) -> SwarmView:
        if not announced(self._stage):
            return await self._read()
        if not self._claims:
            raise SwarmError("nobody answers")
        swarm = self._stage.swarm
        for records in swarm.blocks:
            records.pop(self._peer, None)
        swarm.put(self._peer, ServerState.JOINING, self._claims[0])
        del self._claims[: len(self._claims) > 1]
        return await self._read()


def announced(stage: Stage) -> list[str]:
    return [call.removeprefix("announce ") for call in stage.calls if call.startswith("announce")]


async def test_nobody_else_there_is_one_announcement() -> None:
    stage = Stage("blocks.count=4")
    running = await until_online(stage)
    assert announced(stage) == ["JOINING 0:4", "ONLINE 0:4"]
    await stopped(stage, running)


async def test_we_make_way_for_a_lower_peer_id_before_anything_is_loaded() -> None:
    stage = Stage("blocks.count=4")
    Rival(stage, LOWER, BlockSpan(0, 4))
    running = await until_online(stage)
    assert announced(stage) == ["JOINING 0:4", "JOINING 4:8", "ONLINE 4:8"]
    assert [call for call in stage.calls if call.startswith("load")] == [f"load {n}" for n in range(4, 8)]
    assert stage.daemon.span == BlockSpan(4, 8)
    await stopped(stage, running)
    assert "JOINING" not in {state.name for state in stage.swarm.states_of(stage.member.peer_id).values()}


async def test_a_higher_peer_id_makes_way_for_us() -> None:
    """We look again until it has, and announce nothing else."""
    stage = Stage("blocks.count=4")
    Rival(stage, HIGHER, BlockSpan(0, 4), BlockSpan(0, 4), BlockSpan(4, 8))
    running = await until_online(stage)
    assert announced(stage) == ["JOINING 0:4", "ONLINE 0:4"]
    await stopped(stage, running)


async def test_we_do_not_wait_for_ever_for_one_that_stays() -> None:
    """A server on its way to these blocks, which no longer looks, has a higher PeerID: we go in the end."""
    stage = Stage("blocks.count=4")
    Rival(stage, HIGHER, BlockSpan(0, 4))
    running = await until_online(stage)
    assert announced(stage) == ["JOINING 0:4", "JOINING 4:8", "ONLINE 4:8"]
    await stopped(stage, running)


async def test_blocks_that_the_configuration_names_are_not_given_up() -> None:
    stage = Stage("blocks.span=0:4")
    Rival(stage, LOWER, BlockSpan(0, 4))
    running = await until_online(stage)
    assert announced(stage) == ["JOINING 0:4", "ONLINE 0:4"]
    await stopped(stage, running)


async def test_a_directory_that_cannot_be_read_again_is_no_reason_not_to_serve() -> None:
    stage = Stage("blocks.count=4")
    Rival(stage, LOWER)
    running = await until_online(stage)
    assert announced(stage) == ["JOINING 0:4", "ONLINE 0:4"]
    await stopped(stage, running)

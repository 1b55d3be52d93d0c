"""Whether a server is silent, as its client finds out through real nodes."""

from __future__ import annotations

import pytest

from petalsd.swarm.stub import ServerStub
from tests.swarm.servers import joining, node

pytestmark = pytest.mark.swarm

PING_S = 2.0


async def test_who_answers_is_not_silent_and_who_is_gone_is() -> None:
    """As long as somebody else answers: a silence of all would be ours."""
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        async with node(await joining(first)) as second:
            stub = ServerStub(client, second.peer_id)
            assert not await stub.is_silent(PING_S)
        assert await stub.is_silent(PING_S)
        await first.stop()
        assert not await stub.is_silent(PING_S)


async def test_a_node_of_our_own_that_is_gone_blames_nobody() -> None:
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        stub = ServerStub(client, first.peer_id)
        await client.stop()
        assert not await stub.is_silent(PING_S)

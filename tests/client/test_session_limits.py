"""Servers that allow less than a session asks for."""

from __future__ import annotations

import pytest

from petalsd.errors import RemoteFailure
from tests.client.fake_swarm import FakeServer, FakeSwarm, make_span, run_blocks
from tests.client.test_session import BLOCKS, assert_same, make_session, random_states


@pytest.mark.parametrize(
    "text",
    ["bad_request: max_length = 64: must be 0 to 32", "Cannot allocate KV cache for 64 tokens, max = 32"],
)
async def test_a_server_with_shorter_sessions_is_passed_over(text: str) -> None:
    """petalsd's, and a stock one: another may take longer sessions."""

    def refuse(server: FakeServer, number: int) -> None:
        raise RemoteFailure(server.peer, text)

    short, long = FakeServer(make_span("a", 0, 6), before_step=refuse), FakeServer(make_span("b", 0, 6))
    states = random_states(1, 2)
    async with make_session(FakeSwarm(short, long)) as session:
        assert_same(await session.step(states), run_blocks(BLOCKS, states))
        assert [hop.peer for hop in session.route] == ["b"]
    assert len(short.messages) == 1

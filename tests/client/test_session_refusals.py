"""Servers that refuse what a session asks for: another may take it."""

from __future__ import annotations

import pytest
import torch

from petalsd.errors import RemoteFailure
from tests.client.fake_swarm import FakeServer, FakeSwarm, make_span, refuses_at, refuses_from, run_blocks
from tests.client.test_session import BLOCKS, assert_same, make_session, random_states


@pytest.mark.parametrize(
    "text",
    ["bad_request: max_length = 64: must be 0 to 32", "Cannot allocate KV cache for 64 tokens, max = 32"],
)
async def test_a_server_with_shorter_sessions_is_passed_over(text: str) -> None:
    """petalsd's, and a stock one: another may take longer sessions."""
    short, long = (
        FakeServer(make_span("a", 0, 6), before_step=refuses_from(1, text)),
        FakeServer(make_span("b", 0, 6)),
    )
    states = random_states(1, 2)
    async with make_session(FakeSwarm(short, long)) as session:
        assert_same(await session.step(states), run_blocks(BLOCKS, states))
        assert [hop.peer for hop in session.route] == ["b"]
    assert len(short.messages) == 1


async def test_what_two_servers_refuse_is_not_tried_again() -> None:
    """The session can go on with something else."""
    swarm = FakeSwarm(
        *(FakeServer(make_span(peer, 0, 6), before_step=refuses_at(1, "bad_request: no")) for peer in "abc")
    )
    async with make_session(swarm) as session:
        with pytest.raises(RemoteFailure, match="bad_request"):
            await session.step(random_states(1, 2))
        assert session.position == 0
        assert [len(server.messages) for server in swarm.servers.values()] == [1, 1, 0]
        swarm.failures.clear()
        assert_same(await session.step(random_states(1, 2)), run_blocks(BLOCKS, random_states(1, 2)))


async def test_what_one_server_refuses_another_may_take() -> None:
    """In a later step too, with all tokens before it; one that nobody else could take fails at once."""
    hidden = random_states(1, 3)
    refusing = FakeServer(make_span("a", 0, 6), before_step=refuses_from(2, "bad_request: no"))
    swarm = FakeSwarm(refusing, FakeServer(make_span("b", 0, 6)))
    async with make_session(swarm) as session:
        outputs = [await session.step(part) for part in hidden.split([2, 1], dim=1)]
    assert_same(torch.cat(outputs, dim=1), run_blocks(BLOCKS, hidden))
    async with make_session(FakeSwarm(refusing)) as session:
        with pytest.raises(RemoteFailure, match="bad_request"):
            await session.step(hidden)

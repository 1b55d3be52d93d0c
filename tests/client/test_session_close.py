"""A session that is closed while it steps: the step says so, and leaves nothing open."""

from __future__ import annotations

import asyncio

import pytest

from petalsd.errors import SessionClosed
from tests.client.fake_swarm import FakeServer, FakeSwarm, make_span
from tests.client.test_session import make_session, random_states, two_halves


def hang_at(server: FakeServer, step: int) -> asyncio.Event:
    """Set once the server has got it."""
    asked = asyncio.Event()

    def note(_: FakeServer, number: int) -> None:
        if number == step:
            asked.set()

    server.hangs_at, server.before_step = step, note
    return asked


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("index", [0, 1], ids=["first-server", "last-server"])
async def test_closing_while_a_server_computes(index: int, number: int) -> None:
    """Whether it still answers or not: what the other servers would make of it is not asked for."""
    servers = two_halves()
    asked = hang_at(servers[index], number)
    swarm = FakeSwarm(*servers)
    session = make_session(swarm)
    if number == 2:
        await session.step(random_states(1, 3))
    step = asyncio.create_task(session.step(random_states(1, 2)))
    await asked.wait()
    await session.close()
    servers[index].revived.set()
    with pytest.raises(SessionClosed, match="closed meanwhile"):
        await step
    assert swarm.open_streams == 0 and session.route == []
    assert len(servers[1].messages) == (number if index else number - 1)


async def test_closing_while_a_server_fails() -> None:
    """Nobody is looked for in its place."""
    servers = two_halves()
    swarm = FakeSwarm(*servers, FakeServer(make_span("c", 0, 3)))
    session = make_session(swarm)
    await session.step(random_states(1, 3))
    asked = hang_at(servers[0], 2)
    step = asyncio.create_task(session.step(random_states(1, 2)))
    await asked.wait()
    await session.close()
    servers[0].is_alive = False
    servers[0].revived.set()
    with pytest.raises(SessionClosed, match="closed meanwhile"):
        await step
    assert swarm.open_streams == 0 and not swarm.servers["c"].messages


async def test_closing_while_blocks_are_missing() -> None:
    """No stream is opened afterwards."""
    swarm = FakeSwarm(two_halves()[0])
    session = make_session(swarm)

    def close_and_appear() -> None:
        swarm.servers["b"] = FakeServer(make_span("b", 3, 6))
        session._is_closed = True

    swarm.on_refresh = close_and_appear
    with pytest.raises(SessionClosed, match="closed meanwhile"):
        await session.step(random_states(1, 2))
    assert swarm.open_streams == 0 and not swarm.servers["a"].messages

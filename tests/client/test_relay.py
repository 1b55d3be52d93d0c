"""Steps that servers hand to each other: the same outputs as without, whoever fails, and no way too many."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from petalsd.client.sequence import SequenceManager
from petalsd.errors import RemoteFailure
from petalsd.swarm.directory import SwarmView
from tests.client.fake_swarm import FakeServer, FakeSwarm, dies_at, make_span, refuses_at, run_blocks
from tests.client.test_session import BLOCKS, QUICK, assert_same, make_session, random_states, run_steps

STOCK = "2.3.0.dev2"


def far_swarm(*servers: FakeServer) -> FakeSwarm:
    """Where servers know each other, and we are a long way from them."""
    swarm = FakeSwarm(*servers)
    swarm.are_far = True
    for server in servers:
        server.swarm = swarm
    return swarm


def thirds(version: str | None = None) -> tuple[FakeServer, FakeServer, FakeServer]:
    """``version``: that of the one in the middle."""
    record = {} if version is None else {"version": version}
    return (
        FakeServer(make_span("a", 0, 2)),
        FakeServer(make_span("b", 2, 4, **record)),
        FakeServer(make_span("c", 4, 6)),
    )


async def test_steps_go_from_server_to_server() -> None:
    """From the second one on: then all streams are there. What was answered already is not sent once more."""
    a, b, c = servers = thirds()
    hidden = random_states(2, 9)
    async with make_session(far_swarm(*servers)) as session:
        output = await run_steps(session, hidden, (4, 1, 3, 1))
    assert_same(output, run_blocks(BLOCKS, hidden))
    assert [len(server.messages) for server in servers] == [4, 1, 1]
    assert not a.pushed
    assert len(b.pushed) == len(set(b.pushed)) == 3
    assert c.pushed == b.pushed


async def test_servers_nearby_get_their_steps_from_us() -> None:
    servers = thirds()
    swarm = far_swarm(*servers)
    swarm.are_far = False
    hidden = random_states(1, 5)
    async with make_session(swarm) as session:
        output = await run_steps(session, hidden, (3, 1, 1))
    assert_same(output, run_blocks(BLOCKS, hidden))
    assert [len(server.messages) for server in servers] == [3, 3, 3]
    assert not any(message.metadata.get("next_servers") for server in servers for message in server.messages)


@pytest.mark.parametrize("lost", ["a", "b", "c"])
async def test_what_is_lost_on_the_way_is_sent_by_us(lost: str) -> None:
    """A server that hands nothing on delays nobody for good: all outputs are right."""
    servers = thirds()
    swarm = far_swarm(*servers)
    swarm(lost).swarm = None
    hidden = random_states(2, 7)
    async with make_session(swarm) as session:
        output = await run_steps(session, hidden, (3, 1, 2, 1))
    assert_same(output, run_blocks(BLOCKS, hidden))


async def test_stock_servers_are_left_out() -> None:
    """They hand on tensors of another step; nothing goes to them, from them or past them."""
    servers = thirds(version=STOCK)
    hidden = random_states(1, 5)
    async with make_session(far_swarm(*servers)) as session:
        output = await run_steps(session, hidden, (3, 1, 1))
    assert_same(output, run_blocks(BLOCKS, hidden))
    assert not any(server.pushed for server in servers)


@pytest.mark.parametrize("doomed", [0, 1, 2])
@pytest.mark.parametrize("step", [2, 3])
async def test_a_server_dies_in_a_relayed_step(doomed: int, step: int) -> None:
    """Before or after it handed the step on; the others have the step once."""
    servers = thirds()
    spare = FakeServer(make_span("spare", 0, 6))
    swarm = far_swarm(*servers, spare)
    hidden = random_states(2, 9)
    async with make_session(swarm) as session:
        head = await session.step(hidden[:, :4])
        dead = servers[doomed]
        if step == 2:
            dead.is_alive = False
        else:
            dead.before_step = dies_at(len(dead.messages) + 1)
        tail = await run_steps(session, hidden[:, 4:], (1, 3, 1))
    assert_same(torch.cat([head, tail], dim=1), run_blocks(BLOCKS, hidden))


async def test_a_step_that_failed_leaves_no_answer_behind() -> None:
    """Servers that had it already are fed anew: their answers would be taken for those of the next step."""
    servers = thirds()
    swarm = far_swarm(*servers)
    hidden = random_states(1, 6)
    async with make_session(swarm, options=replace(QUICK, max_failures=0)) as session:
        await session.step(hidden[:, :4])
        servers[
            1
        ].is_alive = False  # a computes, and hands the step to b and us; b is gone, c is expected to answer
        next(iter(servers[2].sessions.values()))._answers.append([torch.full((1, 1, 8), 7.0)])
        with pytest.raises(RemoteFailure):
            await session.step(hidden[:, 4:5])
        servers[1].is_alive = True
        swarm.failures.clear()
        output = await session.step(hidden[:, 4:5])
        output = torch.cat([output, await session.step(hidden[:, 5:])], dim=1)
    assert_same(output, run_blocks(BLOCKS, hidden)[:, 4:])


async def test_a_cancelled_step_leaves_no_answer_behind() -> None:
    servers = thirds()
    hidden, other = random_states(1, 6), random_states(1, 1, seed=5)
    swarm = far_swarm(*servers)
    async with make_session(swarm) as session:
        await session.step(hidden[:, :4])
        servers[0].hangs_at = (
            len(servers[0].messages) + 1
        )  # it has handed the step on, and we do not get its answer
        step = asyncio.create_task(session.step(other))
        for _ in range(20):
            await asyncio.sleep(0)
        assert servers[2].pushed
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
        servers[0].hangs_at = None
        output = await run_steps(session, hidden[:, 4:], (1, 1))
    assert_same(output, run_blocks(BLOCKS, hidden)[:, 4:])


async def test_after_a_rollback() -> None:
    """The servers are told where to go on with the step that they are handed."""
    servers = thirds()
    hidden = random_states(2, 8)
    async with make_session(far_swarm(*servers)) as session:
        await run_steps(session, hidden, (4, 2, 2))
        session.position = 5
        other = torch.cat([hidden[:, :5], random_states(2, 3, seed=9)], dim=1)
        output = await run_steps(session, other[:, 5:], (1, 1, 1))
    assert_same(output, run_blocks(BLOCKS, other)[:, 5:])
    assert len(servers[2].pushed) == 4


async def test_rows_that_change_places_and_prompts_are_told_by_us() -> None:
    servers = thirds()
    hidden, prompts = random_states(2, 6), 0.1 * torch.ones(6, 1, 1, 8)
    async with make_session(far_swarm(*servers)) as session:
        await session.step(hidden[:, :4])
        await session.step(hidden[:, 4:5], hypo_ids=(1, 0))
        await session.step(hidden[:, 5:], prompts=prompts)
    assert not any(server.pushed for server in servers)


async def test_a_refused_step_is_not_answered_twice() -> None:
    """The server in the middle refuses what we send: the last one got nothing of it."""
    servers = thirds()
    spare = FakeServer(make_span("spare", 2, 4))
    servers[1].before_step = refuses_at(2, "overloaded")
    servers[0].swarm = None
    swarm = FakeSwarm(*servers, spare)
    swarm.are_far = True
    hidden = random_states(1, 6)
    async with make_session(swarm) as session:
        output = await run_steps(session, hidden, (4, 1, 1))
        assert [hop.peer for hop in session.route] == ["a", "spare", "c"]
    assert_same(output, run_blocks(BLOCKS, hidden))


async def test_far_is_who_answers_pings_late() -> None:
    """Or was never pinged."""
    rtts = {"near": 0.001, "far": 0.02}
    spans = [make_span(peer, 0, 1) for peer in rtts]
    view = SwarmView("tiny", 1, [{span.peer: span.record for span in spans}])

    async def read_view() -> SwarmView:
        return view

    async def ping(peer: str) -> float:
        return rtts[peer]

    manager = SequenceManager(read_view, ping, "tiny", 1, QUICK)
    assert manager.is_far("near")
    await manager.refresh()
    assert manager.is_far("far")
    assert not manager.is_far("near")

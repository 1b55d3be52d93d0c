"""What a session does when a server says that it handed it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from petalsd.errors import SessionMoved
from petalsd.swarm.stream import RemoteError
from petalsd.types import BlockSpan
from tests.client.fake_swarm import FakeServer, FakeStream, FakeSwarm, make_span, run_blocks
from tests.client.test_session import BLOCKS, QUICK, assert_same, make_session, random_states, run_steps

TAKER = "Qm" + "t" * 44
TICKET = "t" * 43


class Taker(FakeServer):
    """Takes over the caches of the giver's last stream when the ticket is shown; else refuses."""

    giver_stream: FakeStream

    async def open_inference(self, timeout_s: float) -> FakeStream:
        stream = await super().open_inference(timeout_s)
        giver = self.giver_stream

        def check(server: FakeServer, number: int) -> None:
            if server.messages[-1].metadata.get("session_ticket") == TICKET and stream._blocks is None:
                stream._blocks, stream._caches = giver._blocks, list(giver._caches)
                stream._position, stream._max_length = giver._position, giver._max_length

        self.before_step = check
        return stream


class Giver(FakeServer):
    streams: list[FakeStream]

    async def open_inference(self, timeout_s: float) -> FakeStream:
        stream = await super().open_inference(timeout_s)
        self.streams.append(stream)
        return stream


def moves_at(step: int, to: str = TAKER) -> Callable[[FakeServer, int], None]:
    def hook(server: FakeServer, number: int) -> None:
        if number >= step:
            raise RemoteError(server.peer, str(SessionMoved(to, TICKET)))

    return hook


def redirected(step: int) -> tuple[FakeSwarm, Giver, Taker]:
    """A swarm whose only route leads through a giver that hands its session on at its ``step``-th message."""
    giver, taker = Giver(make_span("a", 0, 6), moves_at(step)), Taker(make_span(TAKER, 0, 6))
    giver.streams = []
    swarm = FakeSwarm(giver)
    swarm.servers[TAKER] = taker

    async def opened(timeout_s: float) -> FakeStream:
        taker.giver_stream = giver.streams[-1]
        return await Taker.open_inference(taker, timeout_s)

    taker.open_inference = opened  # type: ignore[method-assign]
    return swarm, giver, taker


async def test_a_session_goes_on_at_the_taker_without_a_replay() -> None:
    """In the middle of a prefill of several messages, with prompts: only what the giver had not seen is sent."""
    swarm, _, taker = redirected(step=3)
    hidden, prompts = random_states(2, 12), 0.1 * torch.randn(6, 1, 2, 8)
    async with make_session(swarm) as session:
        first = await session.step(hidden[:, :9], prompts)
        rest = await run_steps(session, hidden[:, 9:], (1, 2))
        assert [hop.peer for hop in session.route] == [TAKER]
    sent = [message.metadata["start_from_position"] for message in taker.messages]
    assert sent == [0, 4, 8, 9, 10]  # a step's own outputs are not kept, so its messages go again
    assert "session_ticket" not in taker.messages[1].metadata
    assert swarm.failures == []
    assert_same(torch.cat([first, rest], 1), run_blocks(BLOCKS, hidden, prompts))


async def test_rows_change_places_once() -> None:
    """Beams that were reordered with the message that was refused are reordered at the taker, and no more."""
    swarm, _, _ = redirected(step=2)
    hidden = random_states(3, 6)
    order = (2, 0, 0)
    async with make_session(swarm) as session:
        await session.step(hidden[:, :2])
        output = await session.step(hidden[list(order), 2:], None, order)
        assert [hop.peer for hop in session.route] == [TAKER]
    expected = run_blocks(BLOCKS, hidden[list(order)])[:, 2:]
    assert_same(output, expected)


async def test_rows_that_have_changed_places_are_replayed() -> None:
    """The giver had done the first message of a reordering step: the rows must not change once more."""
    swarm, giver, _ = redirected(step=3)
    hidden = random_states(2, 12)
    async with make_session(swarm) as session:
        await session.step(hidden[:, :4])
        giver.before_step = lambda server, number: moves_at(3)(server, number) if number == 3 else None
        output = await session.step(hidden[[1, 0], 4:], None, (1, 0))
        assert [hop.peer for hop in session.route] == [TAKER]
        assert "session_ticket" not in swarm.servers[TAKER].messages[0].metadata
    assert_same(output, run_blocks(BLOCKS, hidden[[1, 0]])[:, 4:])


@pytest.mark.parametrize("why", ["not allowed", "for ever", "unreachable"])
async def test_a_redirect_that_leads_nowhere_is_a_failure_like_any_other(why: str) -> None:
    """The history is fed to whoever the route leads to then."""
    swarm, giver, taker = redirected(step=2)
    swarm.servers["c"] = FakeServer(make_span("c", 0, 6))
    options = QUICK
    if why == "not allowed":
        options = replace(QUICK, blocked_servers=frozenset({TAKER}))
    elif why == "for ever":
        giver.before_step = moves_at(2, to="a" * 40)
        loop = FakeServer(make_span("a" * 40, 0, 6), moves_at(1, to="a" * 40))
        swarm.servers = {"a": giver, "c": swarm.servers["c"], "a" * 40: loop}
    else:
        del swarm.servers[TAKER]
        dead = FakeServer(taker.span, is_alive=False)
        swarm.servers[TAKER] = dead
        swarm.failures.append(TAKER)
    swarm.servers = {
        peer: swarm.servers[peer] for peer in sorted(swarm.servers, key=lambda peer: peer == TAKER)
    }
    hidden = random_states(1, 6)
    async with make_session(swarm, options=options, blocks=BlockSpan(0, 6)) as session:
        output = await run_steps(session, hidden, (3, 2, 1))
        assert [hop.peer for hop in session.route] == ["c"]
    assert_same(output, run_blocks(BLOCKS, hidden))
    if why == "for ever":
        assert len(loop.messages) == 3

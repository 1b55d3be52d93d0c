"""A taker against givers that do everything wrong: typed answers, no page lost, and nobody else pays for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
from hivemind.proto import runtime_pb2

from petalsd.engine.kv_transfer import Place
from petalsd.engine.step import SessionSpec
from petalsd.errors import RemoteFailure
from petalsd.swarm.escrow import NOTHING, Amount, Outcome
from petalsd.swarm.handover import KVShape, Offer, Seal, pack_chunk, pack_end, unpack_text
from petalsd.swarm.node import Node
from petalsd.swarm.stream import MessageStream
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.engine.rig import states
from tests.swarm.conftest import GHOST
from tests.swarm.handing_over import SPAN, Swarm
from tests.swarm.servers import PREFIX
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

WHOLE = Place(SPAN, 0, 20)
PAGES = 6  # of a session of 32 tokens in three blocks; a giver may leave 16 of 64


@pytest_asyncio.fixture(loop_scope="module")
async def swarm(both: Swarm) -> AsyncIterator[Swarm]:
    """After each test both servers have all their pages back, and nobody is charged for anything."""
    both.notes.hand_overs.clear()
    yield both
    await both.idle()
    assert both.second.handler.awaited == NOTHING


def offer(swarm: Swarm, client: str = "", **changes: object) -> Offer:
    spec = SessionSpec(SPAN, 1, 32, client or swarm.client.peer_id)
    sound = Offer(spec, KVShape(2, 16, torch.float32))
    return replace(sound, **changes)  # type: ignore[arg-type]


async def begun(swarm: Swarm, offered: Offer, giver: Node | None = None) -> MessageStream:
    stream = await ServerStub(giver or swarm.client, swarm.second.node.peer_id).open_hand_over()
    try:
        await stream.send(offered.to_wire(PREFIX))
        await stream.receive(runtime_pb2.ExpertResponse, 10.0)
    except BaseException:
        stream.close()
        raise
    return stream


def chunk(tokens: int = 20, place: Place = WHOLE, fill: float = 0.0) -> runtime_pb2.ExpertRequest:
    part = torch.full((len(place.blocks), 1, tokens, 2, 16), fill)
    return pack_chunk(place, (part, part))


async def given(swarm: Swarm, giver: Node | None = None, client: str = "") -> str:
    """The ticket of a session, of the client unless another one is named, that the test itself handed over."""
    offered = offer(swarm, client)
    stream = await begun(swarm, offered, giver or swarm.first.node)
    seal = Seal(offered.to_wire(PREFIX))
    seal.add(chunk())
    await stream.send(chunk())
    await stream.send(pack_end(20, seal.digest))
    reply = await stream.receive(runtime_pb2.ExpertResponse, 10.0)
    stream.close()
    assert reply is not None
    return unpack_text(reply.metadata, "ticket")


async def claim(swarm: Swarm, ticket: str, claimant: Node | None = None, tokens: int = 32) -> torch.Tensor:
    """The answer to one step of the session under ``ticket``; it is closed then."""
    stream = await swarm.second.stub(claimant or swarm.client).open_inference()
    try:
        metadata = {"max_length": tokens, "session_ticket": ticket, "start_from_position": 20}
        uid = replace(swarm.second, span=SPAN).uid
        none = torch.empty(0), torch.empty(0, dtype=torch.int64)
        await stream.send(uid, [states(1, 1), *none], metadata)
        (answer,) = await stream.receive(10.0)
        return answer
    finally:
        stream.abort()


@pytest.mark.parametrize(
    ("changes", "code", "outcome"),
    [
        ({"shape": KVShape(2, 16, torch.bfloat16)}, "bad_request", Outcome.FAILED),
        ({"shape": KVShape(4, 16, torch.float32)}, "bad_request", Outcome.FAILED),
        ({"spec": SessionSpec(BlockSpan(2, 5), 1, 32, GHOST)}, "not_served", Outcome.FAILED),
        (
            {"spec": SessionSpec(SPAN, 1, 32, GHOST, adapter="x")},
            "not_served: active_adapter",
            Outcome.FAILED,
        ),
        ({"spec": SessionSpec(SPAN, 1, 512, GHOST)}, "overloaded", Outcome.OVER_SHARE),
        ({"spec": SessionSpec(SPAN, 1 << 30, 1 << 30, GHOST)}, "overloaded", Outcome.OVER_SHARE),
        ({"spec": SessionSpec(SPAN, 1, 32, "nobody")}, "bad_request", Outcome.FAILED),
        ({"spec": SessionSpec(BlockSpan(0, 4), 1, 32, GHOST)}, "bad_request: giver", Outcome.UNKNOWN_GIVER),
    ],
)
async def test_offers_that_do_not_fit_are_refused(
    swarm: Swarm, changes: dict[str, object], code: str, outcome: Outcome
) -> None:
    """Before anything is sent, with the reason; the last giver is not announced for the first block."""
    with pytest.raises(RemoteFailure, match=code):
        await begun(swarm, offer(swarm, **changes))
    assert swarm.notes.hand_overs == [outcome]


DAMAGED = {
    "tensors = ": chunk(19),
    "dtype = ": pack_chunk(WHOLE, (torch.zeros(3, 1, 20, 2, 16).double(),) * 2),
    "start = .* have 20 tokens": chunk(1, Place(SPAN, 21, 22)),
    "end_block = .*must be of": chunk(20, Place(BlockSpan(1, 5), 0, 20)),
    "end = .*within 32": chunk(20, Place(SPAN, 13, 33)),
    "finite": chunk(fill=torch.nan),
    "start_block = None": runtime_pb2.ExpertRequest(tensors=chunk().tensors),
    "position = None": runtime_pb2.ExpertRequest(),
    "position = 21": pack_end(21, "0" * 64),
    "digest = ": pack_end(20, "0" * 64),
}


@pytest.mark.parametrize("fault", [*DAMAGED, "death"])
async def test_damaged_hand_overs_leave_nothing_behind(swarm: Swarm, fault: str) -> None:
    """Whatever arrives wrong or not at all: a typed error, no ticket, no pages held, no charge."""
    stream = await begun(swarm, offer(swarm))
    assert swarm.second.handler.awaited == Amount(1, 1, PAGES)
    await stream.send(chunk())
    if fault == "death":
        stream.close()
        await eventually(lambda: swarm.notes.hand_overs == [Outcome.FAILED])
        return
    await stream.send(DAMAGED[fault])
    with pytest.raises(RemoteFailure, match=f"bad_request: .*{fault}"):
        await stream.receive(runtime_pb2.ExpertResponse, 10.0)
    stream.close()
    assert len(swarm.second.handler._tickets) == 0
    assert swarm.notes.hand_overs == [Outcome.FAILED]


async def test_a_session_that_ended_while_it_came_is_not_taken(swarm: Swarm) -> None:
    """A ticket for it would send the client away from where it still could go on."""
    offered = offer(swarm)
    stream = await begun(swarm, offered)
    seal = Seal(offered.to_wire(PREFIX))
    seal.add(chunk())
    await stream.send(chunk())
    await eventually(lambda: swarm.second.pool.stats().pages_mapped == PAGES)
    swarm.second.engine.end_work("the server moved on")
    await stream.send(pack_end(20, seal.digest))
    with pytest.raises(RemoteFailure, match="session_closed: the server moved on"):
        await stream.receive(runtime_pb2.ExpertResponse, 10.0)
    stream.close()
    assert swarm.notes.hand_overs == [Outcome.FAILED]
    assert swarm.second.handler.awaited == NOTHING


async def test_a_giver_fills_its_own_share_and_no_more(swarm: Swarm) -> None:
    """Sessions in a client's name cost that client nothing, other givers go on, and half stays for clients."""
    hostile = swarm.client
    await given(swarm, hostile, GHOST)
    half_way = await begun(swarm, offer(swarm, GHOST), hostile)  # counts while it is being received
    with pytest.raises(RemoteFailure, match=r"overloaded: .* of yours, 2 sessions, 2 rows and 12 pages wait"):
        await given(swarm, hostile, GHOST)
    await given(swarm)
    await given(swarm)
    assert swarm.second.handler.awaited == Amount(4, 4, 4 * PAGES)
    own = SessionSpec(BlockSpan(0, 4), 1, 128, GHOST)
    await (await swarm.second.engine.open_session(own)).close()
    half_way.close()
    await eventually(lambda: swarm.second.handler.awaited.sessions == 3)
    await given(swarm, hostile, GHOST)
    swarm.second.handler._tickets.close("the test is over")
    assert swarm.notes.hand_overs.count(Outcome.OVER_SHARE) == 1
    assert swarm.notes.hand_overs.count(Outcome.ENDED) == 4


async def test_a_claim_moves_the_charge_to_the_client(swarm: Swarm) -> None:
    """Within the client's share it goes on, and its giver has room again; beyond it is told so, and replays."""
    tickets = [await given(swarm), await given(swarm)]
    own = await swarm.second.engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 160, swarm.client.peer_id))
    assert (await claim(swarm, tickets[0])).shape == (1, 1, 64)
    assert swarm.second.handler.awaited == Amount(1, 1, PAGES)
    await own.close()
    await eventually(lambda: swarm.second.pool.stats().sessions == 1)
    own = await swarm.second.engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 176, swarm.client.peer_id))
    with pytest.raises(RemoteFailure, match=r"out_of_pages: .* this peer holds 44 of 64"):
        await claim(swarm, tickets[1])
    await own.close()
    with pytest.raises(RemoteFailure, match="not_served: no session of this peer"):
        await claim(swarm, tickets[1])
    expected = [Outcome.TAKEN, Outcome.TAKEN, Outcome.CLAIMED, Outcome.OVER_CLIENTS]
    assert swarm.notes.hand_overs == expected


async def test_a_ticket_is_good_for_one_peer_and_once(swarm: Swarm) -> None:
    """Another peer that shows it is refused, and so is the client that asks for other blocks or comes twice."""
    ticket = await given(swarm)
    with pytest.raises(RemoteFailure, match="not_served: no session of this peer"):
        await claim(swarm, ticket, swarm.first.node)
    with pytest.raises(RemoteFailure, match="bad_request: session_ticket"):
        await claim(swarm, ticket, tokens=48)
    assert swarm.second.handler.awaited == Amount(1, 1, PAGES)
    assert (await claim(swarm, ticket)).shape == (1, 1, 64)
    with pytest.raises(RemoteFailure, match="not_served: no session of this peer"):
        await claim(swarm, ticket)

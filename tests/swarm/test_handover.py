"""Sessions that go from one server to another, over real libp2p: exact where it works, no leak where not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import pytest_asyncio
import torch
from hivemind.proto import runtime_pb2

from petalsd.client.options import ClientOptions
from petalsd.client.routing import Hop
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.engine.step import SessionSpec
from petalsd.errors import RemoteFailure
from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.handover import KVShape, Offer, Seal, pack_chunk, pack_text, unpack_text
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.stream import MessageStream
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, states
from tests.numeric import assert_close
from tests.swarm.servers import PREFIX, Server, joining, node, server
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

SPAN = BlockSpan(1, 4)
RECORD = ServerRecord(ServerState.ONLINE, 1.0, BlockSpan(0, 4), version="petalsd test")
GHOST = "Qm" + "g" * 44


@dataclass
class Swarm:
    """Two servers of the same blocks, and a client."""

    first: Server
    second: Server
    client: Node

    def view(self, *peers: str) -> SwarmView:
        """A directory in which these peers, or both servers, serve everything."""
        records = dict.fromkeys(peers or (self.first.node.peer_id, self.second.node.peer_id), RECORD)
        return SwarmView(PREFIX, 4, [records] * 4)

    def session(self, max_tokens: int = 64) -> InferenceSession:
        terms = StreamTerms(PREFIX, max_tokens, ClientOptions(min_backoff_s=0.01))
        return InferenceSession(Route(self), partial(ServerStub, self.client), terms, SPAN)

    async def idle(self) -> None:
        await self.first.idle()
        await self.second.idle()

    @property
    def expected(self) -> TinyModel:
        return self.first.model


class Route:
    """Leads to the server that has failed less often, the first one at first."""

    def __init__(self, swarm: Swarm) -> None:
        self._peers = [swarm.first.node.peer_id, swarm.second.node.peer_id]
        self.failures: list[str] = []

    def route_session(self, blocks: BlockSpan, max_tokens: int) -> list[Hop]:
        peer = min(self._peers, key=self.failures.count)
        return [Hop(RemoteSpan(peer, BlockSpan(0, 4), RECORD), blocks)]

    async def refresh(self) -> None:
        """There is nothing to read."""

    def report_failure(self, peer: str) -> None:
        self.failures.append(peer)

    def report_success(self, peer: str) -> None:
        """Nothing is forgiven."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Swarm]:
    path = tmp_path_factory.mktemp("tiny")
    model = TinyModel(path)
    async with (
        node() as first,
        node(await joining(first)) as second,
        node(await joining(first, client_mode=True)) as client,
        server(first, path, model=model, kv_tokens=128) as one,
        server(second, path, model=model, kv_tokens=128) as two,
    ):
        yield Swarm(one, two, client)


@pytest_asyncio.fixture(loop_scope="module")
async def swarm(running: Swarm) -> AsyncIterator[Swarm]:
    """After each test both servers have all their pages back."""
    yield running
    await running.idle()


async def feed(session: InferenceSession, hidden: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.cat([await session.step(part) for part in hidden.split(sizes, dim=1)], dim=1)


async def test_a_client_goes_on_where_its_session_went(swarm: Swarm) -> None:
    """Rows in another order, prompts, a rollback: the numbers are those of one server, and nothing is replayed."""
    hidden = states(2, 30)
    prompts = 0.1 * states(3, 4).view(3, 1, 4, -1)
    async with swarm.session() as session, swarm.session() as undisturbed:
        outputs = []
        for one in (session, undisturbed):
            parts = [
                await one.step(hidden[:, :18], prompts),
                await one.step(hidden[[1, 0], 18:20], None, (1, 0)),
            ]
            if one is session:
                assert await swarm.first.handler.hand_over(swarm.view(), None, 20.0) == 1
                before = swarm.second.engine.stats().tokens_total
            one.position = 19
            parts.append(await feed(one, hidden[[1, 0], 19:], [1, 1, 9]))
            outputs.append(torch.cat(parts, 1))
        assert [hop.peer for hop in session.route] == [swarm.second.node.peer_id]
        assert swarm.second.engine.stats().tokens_total - before == 2 * 11
        assert await swarm.first.handler.hand_over(swarm.view(GHOST), None, 20.0) == 0
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


async def test_sessions_go_between_two_steps(swarm: Swarm) -> None:
    """Under a client that never pauses, there and back; only sessions that use other blocks are asked."""
    hidden = states(1, 60)
    async with swarm.session() as session:
        await session.step(hidden[:, :5])
        decoding = asyncio.create_task(feed(session, hidden[:, 5:], [1] * 55))
        assert await swarm.first.handler.hand_over(swarm.view(), BlockSpan(0, 4), 20.0) == 0
        assert await swarm.first.handler.hand_over(swarm.view(), BlockSpan(2, 4), 20.0) == 1
        await eventually(lambda: bool(swarm.second.handler._calls))
        await eventually(lambda: all(call.span for call in swarm.second.handler._calls))
        assert await swarm.second.handler.hand_over(swarm.view(), None, 20.0) == 1
        output = await decoding
        assert [hop.peer for hop in session.route] == [swarm.first.node.peer_id]
    assert_close(output, swarm.expected.expected(hidden, SPAN).detach()[:, 5:], 1e-4, 1e-4, "there and back")


async def test_nobody_takes_it(swarm: Swarm) -> None:
    """A full server refuses, one that is gone does not answer: the session stays and goes on where it is."""
    hidden = states(1, 20)
    async with swarm.session(max_tokens=128) as session:
        outputs = [await session.step(hidden[:, :16])]
        full = await swarm.second.engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 112, "somebody"))
        view = swarm.view(GHOST, swarm.second.node.peer_id)
        assert await swarm.first.handler.hand_over(view, None, 20.0) == 0
        outputs.append(await feed(session, hidden[:, 16:], [1, 3]))
        await full.close()
        assert [hop.peer for hop in session.route] == [swarm.first.node.peer_id]
    assert_close(torch.cat(outputs, 1), swarm.expected.expected(hidden, SPAN).detach(), 1e-4, 1e-4, "stays")


async def test_a_taker_that_lost_it_is_replaced_by_a_replay(swarm: Swarm) -> None:
    """The ticket leads nowhere: the client feeds its history, as after any failure."""
    hidden = states(1, 12)
    async with swarm.session() as session:
        outputs = [await session.step(hidden[:, :9])]
        assert await swarm.first.handler.hand_over(swarm.view(), None, 20.0) == 1
        swarm.second.handler._tickets.close("the test dropped it")
        outputs.append(await feed(session, hidden[:, 9:], [1, 2]))
    assert_close(torch.cat(outputs, 1), swarm.expected.expected(hidden, SPAN).detach(), 1e-4, 1e-4, "replay")


async def test_the_session_of_a_stock_client_stays(swarm: Swarm) -> None:
    """It could not follow, and has the time of a drain to finish."""
    stock = await swarm.first.stock_session(swarm.client)
    await stock.step(swarm.first.uid, states(1, 3), max_length=8)
    assert await swarm.first.handler.hand_over(swarm.view(), None, 20.0) == 0
    await stock.step("", states(1, 1))
    assert await stock.end()


# The taker against givers that do everything wrong


def offer(swarm: Swarm, position: int = 20, **changes: object) -> Offer:
    spec = SessionSpec(SPAN, 1, 32, swarm.client.peer_id)
    sound = Offer(spec, position, KVShape(2, 16, torch.float32))
    return replace(sound, **changes)  # type: ignore[arg-type]


async def begun(swarm: Swarm, offered: Offer) -> MessageStream:
    stream = await ServerStub(swarm.client, swarm.second.node.peer_id).open_hand_over()
    try:
        await stream.send(offered.to_wire(PREFIX))
        await stream.receive(runtime_pb2.ExpertResponse, 10.0)
    except BaseException:
        stream.close()
        raise
    return stream


def chunk(tokens: int = 20) -> runtime_pb2.ExpertRequest:
    return pack_chunk((torch.zeros(1, tokens, 2, 16), torch.zeros(1, tokens, 2, 16)))


async def given(swarm: Swarm) -> str:
    """The ticket of a session that the test itself handed over."""
    offered = offer(swarm)
    stream = await begun(swarm, offered)
    seal = Seal(offered.to_wire(PREFIX))
    for _ in SPAN:
        seal.add(chunk())
        await stream.send(chunk())
    await stream.send(runtime_pb2.ExpertRequest(metadata=pack_text("digest", seal.digest)))
    reply = await stream.receive(runtime_pb2.ExpertResponse, 10.0)
    stream.close()
    assert reply is not None
    return unpack_text(reply.metadata, "ticket")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"shape": KVShape(2, 16, torch.bfloat16)}, "bad_request"),
        ({"shape": KVShape(4, 16, torch.float32)}, "bad_request"),
        ({"position": 33}, "bad_request"),
        ({"spec": SessionSpec(BlockSpan(2, 5), 1, 32, GHOST)}, "not_served"),
        ({"spec": SessionSpec(SPAN, 1, 512, GHOST)}, "out_of_pages"),
        ({"spec": SessionSpec(SPAN, 1, 32, "nobody")}, "bad_request"),
    ],
)
async def test_offers_that_do_not_fit_are_refused(
    swarm: Swarm, changes: dict[str, object], code: str
) -> None:
    """Before anything is sent, with the reason."""
    with pytest.raises(RemoteFailure, match=f"{code}: "):
        await begun(swarm, offer(swarm, **changes))


@pytest.mark.parametrize("fault", ["digest", "shape", "dtype", "not finite", "end", "death"])
async def test_damaged_hand_overs_leave_nothing_behind(swarm: Swarm, fault: str) -> None:
    """Whatever arrives wrong or not at all: a typed error, no ticket, no pages held."""
    stream = await begun(swarm, offer(swarm))
    for _ in range(2):
        await stream.send(chunk())
    if fault == "death":
        return stream.close()
    damaged = {
        "digest": chunk(),
        "shape": chunk(19),
        "dtype": pack_chunk((torch.zeros(1, 20, 2, 16).double(),) * 2),
        "not finite": pack_chunk((torch.full((1, 20, 2, 16), torch.nan),) * 2),
        "end": runtime_pb2.ExpertRequest(),
    }
    await stream.send(damaged[fault])
    if fault == "digest":
        await stream.send(runtime_pb2.ExpertRequest(metadata=pack_text("digest", "0" * 64)))
    with pytest.raises(RemoteFailure, match="bad_request: "):
        await stream.receive(runtime_pb2.ExpertResponse, 10.0)
    stream.close()
    assert len(swarm.second.handler._tickets) == 0


async def test_a_ticket_is_good_for_one_peer_and_once(swarm: Swarm) -> None:
    """Another peer that shows it is refused, and so is the client that asks for other blocks or comes twice."""
    ticket = await given(swarm)
    other, own = (swarm.second.stub(asking) for asking in (swarm.first.node, swarm.client))

    async def claim(stub: ServerStub, tokens: int = 32) -> torch.Tensor:
        stream = await stub.open_inference()
        try:
            metadata = {"max_length": tokens, "session_ticket": ticket, "start_from_position": 20}
            uid = replace(swarm.second, span=SPAN).uid
            none = torch.empty(0), torch.empty(0, dtype=torch.int64)
            await stream.send(uid, [states(1, 1), *none], metadata)
            (answer,) = await stream.receive(10.0)
            return answer
        finally:
            stream.abort()

    with pytest.raises(RemoteFailure, match="not_served: no session of this peer"):
        await claim(other)
    with pytest.raises(RemoteFailure, match="bad_request: session_ticket"):
        await claim(own, tokens=48)
    assert (await claim(own)).shape == (1, 1, 64)
    with pytest.raises(RemoteFailure, match="not_served: no session of this peer"):
        await claim(own)

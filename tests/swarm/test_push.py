"""Row 16 of the checklist: steps handed from server to server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from hivemind.p2p import P2PContext

from petalsd.errors import RemoteFailure
from petalsd.swarm import push
from petalsd.swarm.codec import encode_tensor
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.observer import NullObserver
from petalsd.swarm.protocol import handle_name, make_chain
from petalsd.swarm.requests import NextServer, StepMessage
from petalsd.swarm.serving import HandlerLimits
from petalsd.swarm.stream import RemoteError
from petalsd.types import BlockSpan
from tests.engine.rig import states
from tests.numeric import assert_close
from tests.swarm.servers import PREFIX, Server, joining, node, server
from tests.swarm.stock import DUMMY, DUMMY_INT64, Request, Response, StockSession, stock_request
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
HEAD, TAIL = BlockSpan(0, 2), BlockSpan(2, 4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chain(
    nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Server, Server]]:
    """Two servers of one model: the first is asked for blocks 0:2, the second for 2:4."""
    path = tmp_path_factory.mktemp("chain")
    async with (
        node(await joining(nodes[0])) as other,
        server(nodes[0], path) as first,
        server(other, path, model=first.model) as second,
    ):
        yield replace(first, span=HEAD), replace(second, span=TAIL)


class Pair:
    """A client's two sessions; the tail's session id is what the head pushes to."""

    def __init__(self, chain: tuple[Server, Server], client: Node) -> None:
        self.servers = chain
        self.client = client
        self.name = str(uuid.uuid4())
        self.head: StockSession
        self.tail: StockSession

    async def open(self, hidden: torch.Tensor) -> torch.Tensor:
        """Prefill both, without pushes."""
        head, tail = self.servers
        self.head, self.tail = await head.stock_session(self.client), await tail.stock_session(self.client)
        middle = await self.head.step(head.uid, hidden, max_length=32, step_id="open")
        return await self.tail.step(tail.uid, middle, max_length=32, step_id="open", session_id=self.name)

    def hop(self, span: BlockSpan = TAIL) -> list[object]:
        return [self.servers[1].node.peer_id, self.name, span.start, span.end]

    async def end(self) -> None:
        assert await self.head.end() and await self.tail.end()


async def test_row_16_a_pushed_step_is_answered_on_the_clients_stream(
    chain: tuple[Server, Server], client: Node
) -> None:
    """The tail answers before the client has sent it anything; the client's own message is then skipped."""
    hidden = states(1, 4)
    pair = Pair(chain, client)
    answers = [await pair.open(hidden[:, :2])]
    middle = await pair.head.step(
        "", hidden[:, 2:3], step_id="s", next_servers=[pair.hop()], start_from_position=2
    )
    answers.append(await pair.tail.answer())
    pair.tail.put("", [middle, DUMMY, DUMMY_INT64], {"step_id": "s"})
    middle = await pair.head.step("", hidden[:, 3:], step_id="t")
    answers.append(await pair.tail.step("", middle, step_id="t"))
    expected = chain[0].model.expected(hidden).detach()
    assert_close(torch.cat(answers, dim=1), expected, **TOLERANCE, what="through a push")
    await pair.end()


async def test_row_16_the_current_steps_tensors_are_pushed(
    chain: tuple[Server, Server], client: Node
) -> None:
    """Beam search survives pushes: hypo_ids of the step go along, not those of the first message."""
    hidden = states(2, 3)
    pair = Pair(chain, client)
    await pair.open(hidden[:, :2])
    beams = torch.tensor([1, 1])
    await pair.head.step("", hidden[:, 2:], hypo_ids=beams, step_id="s", next_servers=[pair.hop()])
    answer = await pair.tail.answer()
    swapped = torch.cat([hidden[beams, :2], hidden[:, 2:]], dim=1)
    assert_close(answer, chain[0].model.expected(swapped).detach()[:, 2:], **TOLERANCE, what="beams")
    await pair.end()


@pytest.mark.parametrize(
    "hop", [["QmNobody", "x", 2, 4], ["12D3KooWPPYTbCekn58DYPfnN3EpyNH2Y4LAnCUmRmTCwXsU74EX", "x", 2, 4]]
)
async def test_row_16_a_push_that_fails_does_not_fail_the_step(
    chain: tuple[Server, Server], client: Node, hop: list[object]
) -> None:
    """A next server that cannot be reached, or is no peer at all, costs the client nothing."""
    pair = Pair(chain, client)
    await pair.open(states(1, 2))
    assert (await pair.head.step("", states(1, 1), step_id="s", next_servers=[hop])).shape == (1, 1, 64)
    await pair.end()


async def test_row_16_a_step_with_prompts_is_not_pushed(chain: tuple[Server, Server], client: Node) -> None:
    """The prompts of a step are cut for one server's blocks, so the next must get its own from the client."""
    pair = Pair(chain, client)
    await pair.open(states(1, 2))
    prompts = torch.zeros(2, 1, 1, 64)
    middle = await pair.head.step("", states(1, 1), prompts, step_id="s", next_servers=[pair.hop()])
    assert not len(chain[0].handler.pusher)
    assert (await pair.tail.step("", middle, step_id="s")).shape == (1, 1, 64)
    await pair.end()


async def test_row_16_an_unknown_session_is_no_error(chain: tuple[Server, Server], client: Node) -> None:
    """A push for a session that has ended, or for other blocks than it has, is dropped without a word."""
    pair = Pair(chain, client)
    await pair.open(states(1, 2))
    middle = await pair.head.step("", states(1, 1), step_id="s", next_servers=[pair.hop(BlockSpan(3, 4))])
    async with asyncio.timeout(10):
        await chain[0].handler.pusher.wait()
    answer = await pair.tail.step("", middle, step_id="s")
    assert answer.shape == (1, 1, 64)
    await pair.end()


class Receivers:
    """Stubs of next servers: some hang until they are let go, some fail. A clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.hanging: dict[str, asyncio.Event] = {}
        self.now = 0.0
        monkeypatch.setattr(push, "ServerStub", self._stub)
        self.pusher = push.Pusher(Node(NodeOptions()), PREFIX, 5.0, NullObserver(), lambda: self.now)
        self._output = encode_tensor(states(1, 1))

    async def push(self, *peers: str, client: str | None = None) -> list[str]:
        """One push for each of them, each of its own client or all of one; whom they went out to."""
        self.arrived.clear()
        for peer in peers:
            step = StepMessage([], {}, "", None, None, (NextServer(peer, "session", TAIL),))
            self.pusher.push(step, [], self._output, client or f"client of {peer}")
        await asyncio.sleep(0)
        return list(self.arrived)

    def _stub(self, _: object, peer: str) -> Receivers._Stub:
        return self._Stub(self, peer)

    class _Stub:
        def __init__(self, receivers: Receivers, peer: str) -> None:
            self._receivers, self._peer = receivers, peer

        async def push(self, *_: object) -> None:
            self._receivers.arrived.append(self._peer)
            if self._peer in self._receivers.hanging:
                await self._receivers.hanging[self._peer].wait()
            if self._peer in self._receivers.errors:
                raise self._receivers.errors[self._peer]


async def test_a_peer_that_hangs_holds_up_the_pushes_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a share of the places; what is over it is not pushed, and its client sends it."""
    receivers = Receivers(monkeypatch)
    receivers.hanging["hangs"] = asyncio.Event()
    arrived = await receivers.push(*["hangs"] * 300, "lives")
    assert arrived.count("hangs") == 64 == len(receivers.pusher) - 1 and arrived[-1] == "lives"
    receivers.hanging["hangs"].set()
    await receivers.pusher.wait()
    assert not len(receivers.pusher) and not receivers.pusher._per_peer


async def test_pushes_to_a_peer_that_hangs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is unanswered for longer than a round trip takes, no more go there."""
    receivers = Receivers(monkeypatch)
    receivers.hanging["hangs"] = asyncio.Event()
    assert await receivers.push("hangs") == ["hangs"]
    receivers.now = 0.9
    assert await receivers.push("hangs") == ["hangs"]
    receivers.now = 1.0
    assert await receivers.push("hangs", "lives") == ["lives"]
    receivers.hanging["hangs"].set()
    await receivers.pusher.wait()
    assert await receivers.push("hangs", "hangs") == ["hangs", "hangs"]
    await receivers.pusher.wait()


async def test_a_peer_that_a_push_did_not_reach_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while; then one push goes there at a time, until one arrives."""
    receivers = Receivers(monkeypatch)
    receivers.errors["lost"] = RemoteFailure("lost", "took longer than 5 s")
    assert await receivers.push("lost") == ["lost"]
    await receivers.pusher.wait()
    receivers.now = 29.0
    assert await receivers.push("lost", "lives") == ["lives"]
    receivers.now = 30.0
    assert await receivers.push("lost", "lost") == ["lost"]
    await receivers.pusher.wait()
    receivers.now = 59.0
    assert await receivers.push("lost") == []
    receivers.now, receivers.errors = 60.0, {}
    assert await receivers.push("lost", "lost") == ["lost"]
    await receivers.pusher.wait()
    assert await receivers.push("lost", "lost") == ["lost", "lost"]
    await receivers.pusher.wait()


async def test_a_client_of_servers_that_hang_leaves_places_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it names: each of its pushes holds a place until it is given up."""
    receivers = Receivers(monkeypatch)
    hanging = [f"hangs {number}" for number in range(300)]
    receivers.hanging = {peer: asyncio.Event() for peer in hanging}
    assert await receivers.push(*hanging, client="hostile") == hanging[:64]
    assert await receivers.push("lives", client="other") == ["lives"]
    for event in receivers.hanging.values():
        event.set()
    await receivers.pusher.wait()
    assert await receivers.push("lives", client="hostile") == ["lives"]
    await receivers.pusher.wait()
    assert not receivers.pusher._per_client


async def test_a_refused_push_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client makes any server refuse one, by a hop that is not there: it must not cut others off."""
    receivers = Receivers(monkeypatch)
    receivers.errors["lives"] = RemoteError("lives", "not_served: model 'other' is not served here")
    for _ in range(2):
        assert await receivers.push("lives") == ["lives"]
        await receivers.pusher.wait()


async def test_peers_that_are_left_alone_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may name as many as they like."""
    receivers = Receivers(monkeypatch)
    receivers.errors = {f"p{number}": RemoteFailure("p", "no route") for number in range(300)}
    for peer in receivers.errors:
        await receivers.push(peer)
        await receivers.pusher.wait()
    assert len(receivers.pusher._failed) == 256
    assert await receivers.push("p0", "p299") == ["p0"]
    await receivers.pusher.wait()


async def test_a_push_is_given_up_long_before_a_request_is(
    chain: tuple[Server, Server], client: Node, tmp_path: Path
) -> None:
    """A next server that takes the push and says nothing holds its place and its tensors for seconds only."""
    begun = asyncio.Event()

    async def hang(request: Request, context: P2PContext) -> Response:
        begun.set()
        await asyncio.Event().wait()
        return Response()

    async with node(await joining(chain[0].node)) as deaf, node(await joining(deaf)) as other:
        await deaf.p2p.add_protobuf_handler(handle_name("rpc_push"), hang, Request)
        limits = HandlerLimits(push_timeout_s=0.5)
        async with server(other, tmp_path, limits=limits, model=chain[0].model) as head:
            session = await head.stock_session(client)
            hop = [deaf.peer_id, "session", TAIL.start, TAIL.end]
            await session.step(head.uid, states(1, 1), max_length=4, step_id="a", next_servers=[hop])
            await begun.wait()
            assert len(head.handler.pusher) == 1
            await eventually(lambda: not len(head.handler.pusher), timeout_s=5.0)
            assert await session.end()


async def test_a_bad_push_leaves_the_session_to_its_client(
    chain: tuple[Server, Server], client: Node
) -> None:
    """A pushed step that does not fit is dropped; the client's own message for the step still counts."""
    hidden = states(1, 3)
    pair = Pair(chain, client)
    first = await pair.open(hidden[:, :2])
    bad = [states(5, 1), DUMMY, DUMMY_INT64]
    metadata = {"session_id": pair.name, "step_id": "s", "pushed": True}
    await _push(chain[1], client, bad, metadata)
    middle = await pair.head.step("", hidden[:, 2:], step_id="s")
    second = await pair.tail.step("", middle, step_id="s")
    expected = chain[0].model.expected(hidden).detach()
    assert_close(torch.cat([first, second], dim=1), expected, **TOLERANCE, what="after a bad push")
    await pair.end()


async def _push(to: Server, client: Node, tensors: list[torch.Tensor], metadata: dict[str, object]) -> None:
    await to.stock(client).rpc_push(stock_request(make_chain(PREFIX, to.span), tensors, metadata), timeout=10)

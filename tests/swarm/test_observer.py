"""What real handlers, streams, pushes and announcements tell their observer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from hivemind.p2p import P2PHandlerError
from hivemind.proto import runtime_pb2

from petalsd.engine.step import PassRequest
from petalsd.errors import BadRequest, DeadlineExceeded, Draining, RemoteFailure, SwarmError
from petalsd.swarm.announcer import Announcer, AnnouncerOptions
from petalsd.swarm.escrow import Outcome
from petalsd.swarm.faults import CODES, wire_code, wire_text
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState, make_chain
from petalsd.swarm.serving import HandlerLimits
from petalsd.swarm.stream import RemoteError, StreamEnded
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, states
from tests.swarm.servers import PREFIX, Server, joining, node, server
from tests.swarm.stock import DUMMY, DUMMY_INT64, TIMEOUT_S, stock_request
from tests.swarm.test_announcer import FakeDHT, make_record
from tests.swarm.test_malformed import raw_stream
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]
NOBODY = "12D3KooWPPYTbCekn58DYPfnN3EpyNH2Y4LAnCUmRmTCwXsU74EX"


class Notes:
    """``swarm.observer.SwarmObserver`` that keeps what it hears."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.abandoned: Counter[str] = Counter()
        self.received_bytes = 0
        self.sent_bytes = 0
        self.flows: list[tuple[int, float, bool]] = []
        self.acknowledgements: list[tuple[str, int, float]] = []
        self.first_answers: list[float] = []
        self.pushes: list[bool] = []
        self.hand_overs: list[Outcome] = []
        self.announcements: list[bool] = []

    def call_began(self, method: str) -> None:
        self.calls[method] += 1

    def call_failed(self, method: str, code: str) -> None:
        self.failures[method, code] += 1

    def call_abandoned(self, method: str) -> None:
        self.abandoned[method] += 1

    def received(self, num_bytes: int) -> None:
        self.received_bytes += num_bytes

    def sent(self, num_bytes: int) -> None:
        self.sent_bytes += num_bytes

    def flowed(self, num_bytes: int, seconds: float, *, is_upload: bool) -> None:
        self.flows.append((num_bytes, seconds, is_upload))

    def acknowledged(self, peer: str, num_bytes: int, seconds: float) -> None:
        self.acknowledgements.append((peer, num_bytes, seconds))

    def first_answer(self, wait_s: float) -> None:
        self.first_answers.append(wait_s)

    def pushed(self, is_delivered: bool) -> None:
        self.pushes.append(is_delivered)

    def handed_over(self, outcome: Outcome) -> None:
        self.hand_overs.append(outcome)

    def announced(self, is_stored: bool) -> None:
        self.announcements.append(is_stored)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("observed"))


@asynccontextmanager
async def observed(
    first: Node, model: TinyModel, limits: HandlerLimits | None = None
) -> AsyncIterator[tuple[Server, Notes]]:
    """A server on a node of its own, and what it tells."""
    notes = Notes()
    async with (
        node(await joining(first)) as own,
        server(own, Path(), limits=limits, model=model, observer=notes) as running,
    ):
        yield running, notes


async def test_a_session_is_one_call_with_one_first_answer(
    nodes: tuple[Node, Node], client: Node, model: TinyModel
) -> None:
    """Its bytes are those of the messages, both ways, as the steps come."""
    async with observed(nodes[0], model) as (tiny, notes):
        session = await tiny.stock_session(client)
        await session.step(tiny.uid, states(1, 3), max_length=8)
        after_one = (notes.received_bytes, notes.sent_bytes)
        await session.step("", states(1, 1))
        assert await session.end()
        await tiny.idle()
    assert notes.calls == {"rpc_inference": 1}
    assert 3 * 64 * 4 < after_one[0] < 4000
    assert 3 * 64 * 4 < after_one[1] < 2000
    assert notes.received_bytes > after_one[0] + 64 * 4
    assert after_one[1] + 64 * 4 < notes.sent_bytes < after_one[1] + 1000
    assert len(notes.first_answers) == 1
    assert 0 < notes.first_answers[0] < TIMEOUT_S
    assert (notes.failures, notes.abandoned) == ({}, {})


async def test_passes_are_calls_whole_or_streamed(
    nodes: tuple[Node, Node], client: Node, model: TinyModel
) -> None:
    """Unary messages count their bytes too."""
    small, large = states(1, 3), states(16, 300)
    async with observed(nodes[0], model) as (tiny, notes):
        await tiny.stub(client).forward(tiny.uid, [small, DUMMY], {})
        assert small.nbytes < notes.received_bytes < 2000 and small.nbytes < notes.sent_bytes < 2000, "unary"
        await tiny.stub(client).backward(tiny.uid, [small, small, DUMMY], {})
        await tiny.stub(client).forward(tiny.uid, [large, DUMMY], {}, timeout_s=60)
        await tiny.stub(client).rpc_info()
    assert notes.calls == {"rpc_forward": 1, "rpc_backward": 1, "rpc_forward_stream": 1, "rpc_info": 1}
    assert notes.received_bytes > large.nbytes and notes.sent_bytes > large.nbytes
    assert notes.failures == {}


async def test_large_messages_tell_how_long_they_took(
    nodes: tuple[Node, Node], client: Node, model: TinyModel
) -> None:
    """Those that come with what came after their first piece, those that go less what may be on the way."""
    large = states(64, 1200)
    async with observed(nodes[0], model) as (tiny, notes):
        stream = await tiny.stub(client).open_inference()
        metadata = {"max_length": 1200, "alloc_timeout": TIMEOUT_S}
        await stream.send(tiny.uid, [large, DUMMY, DUMMY_INT64], metadata)
        with pytest.raises(RemoteFailure):
            await stream.receive(TIMEOUT_S)
        stream.abort()
        await tiny.idle()
    (num_bytes, seconds, is_upload), *_ = notes.flows
    assert large.nbytes // 2 < num_bytes <= large.nbytes + 1000 and 0 < seconds < TIMEOUT_S and not is_upload


async def test_errors_are_told_by_the_code_that_the_peer_gets(
    nodes: tuple[Node, Node], client: Node, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unary and streamed; a bug of ours is internal_error."""
    request = stock_request(f"{PREFIX}.9", [states(1, 3), DUMMY], {})

    async def requests() -> AsyncIterator[object]:
        yield request

    async def break_down(asked: PassRequest) -> torch.Tensor:
        raise RuntimeError("a bug")

    async with observed(nodes[0], model) as (tiny, notes):
        with pytest.raises(P2PHandlerError, match="not_served"):
            await tiny.stock(client).rpc_forward(request, timeout=TIMEOUT_S)
        with pytest.raises(P2PHandlerError, match="not_served"):
            await anext(await tiny.stock(client).rpc_forward_stream(requests()))
        with pytest.raises(RemoteError, match="bad_request"):
            await tiny.stub(client).forward(tiny.uid, [states(1, 3)[:, :, :5], DUMMY], {})
        monkeypatch.setattr(tiny.engine, "forward", break_down)
        with pytest.raises(RemoteError, match="internal_error"):
            await tiny.stub(client).forward(tiny.uid, [states(1, 3), DUMMY], {})
    assert notes.failures == {
        ("rpc_forward", "not_served"): 1,
        ("rpc_forward_stream", "not_served"): 1,
        ("rpc_forward", "bad_request"): 1,
        ("rpc_forward", "internal_error"): 1,
    }
    assert notes.calls == {"rpc_forward": 3, "rpc_forward_stream": 1}


async def test_a_caller_that_leaves_is_not_an_error(
    nodes: tuple[Node, Node], client: Node, model: TinyModel
) -> None:
    """It is told apart, and so is a session that ends because the server stops."""
    async with observed(nodes[0], model) as (tiny, notes):
        stream = await tiny.stub(client).open_inference()
        await stream.send(tiny.uid, [states(1, 2), DUMMY, DUMMY_INT64], {"max_length": 8})
        await stream.receive(TIMEOUT_S)
        stream.abort()
        await eventually(lambda: notes.abandoned)
        assert notes.abandoned == {"rpc_inference": 1}
        staying = await tiny.stub(client).open_inference()
        await staying.send(tiny.uid, [states(1, 2), DUMMY, DUMMY_INT64], {"max_length": 8})
        await staying.receive(TIMEOUT_S)
        await tiny.handler.stop("going home")
        with pytest.raises(RemoteFailure, match="going home"):
            await staying.receive(TIMEOUT_S)
        await staying.close()
    assert notes.failures == {("rpc_inference", "session_closed"): 1}
    assert notes.abandoned == {"rpc_inference": 1}


@pytest.mark.parametrize("method", ["rpc_inference", "rpc_forward_stream", "rpc_backward_stream"])
async def test_a_caller_that_fails_is_no_error_of_ours(
    nodes: tuple[Node, Node],
    client: Node,
    model: TinyModel,
    method: str,
) -> None:
    """A stock client whose own requests break says so in an error frame; it may say anything."""
    async with observed(nodes[0], model) as (tiny, notes):
        stream = await raw_stream(tiny, client, method)
        await stream.send_error("ValueError('of the client')")
        with pytest.raises(StreamEnded):
            await stream.receive(runtime_pb2.ExpertResponse, TIMEOUT_S)
        stream.close()
    assert (notes.failures, notes.abandoned) == ({}, {method: 1})


async def test_a_call_that_takes_too_long_is_told_as_such(
    nodes: tuple[Node, Node], client: Node, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(asked: PassRequest) -> torch.Tensor:
        await asyncio.sleep(TIMEOUT_S)
        return asked.hidden

    async with observed(nodes[0], model, HandlerLimits(request_timeout_s=0.2)) as (tiny, notes):
        monkeypatch.setattr(tiny.engine, "forward", hang)
        with pytest.raises(RemoteError, match="deadline_exceeded"):
            await tiny.stub(client).forward(tiny.uid, [states(1, 3), DUMMY], {})
    assert notes.failures == {("rpc_forward", "deadline_exceeded"): 1}


async def test_pushes_are_told_by_their_outcome(
    nodes: tuple[Node, Node], client: Node, model: TinyModel
) -> None:
    """One to a server that answers, though it has no such session, and one to nobody."""
    async with observed(nodes[0], model) as (head, notes), observed(nodes[0], model) as (tail, heard):
        session = await head.stock_session(client)
        uid = make_chain(PREFIX, BlockSpan(0, 2))
        hops = [[peer, "no-session", 2, 4] for peer in (tail.node.peer_id, NOBODY)]
        for number, hop in enumerate(hops):
            await session.step(uid, states(1, 1), step_id=str(number), next_servers=[hop], max_length=8)
            async with asyncio.timeout(TIMEOUT_S):
                await head.handler.pusher.wait()
        assert await session.end()
        tail_peer = tail.node.peer_id
    assert notes.pushes == [True, False]
    ((peer, num_bytes, seconds),) = notes.acknowledgements
    assert peer == tail_peer and 64 * 4 < num_bytes < 2000 and 0 < seconds < TIMEOUT_S
    assert heard.calls == {"rpc_push": 1}
    assert heard.received_bytes > 64 * 4


async def test_announcements_are_told_by_their_outcome() -> None:
    """What was last stored, and when, is kept; a failure changes neither."""
    dht, notes = FakeDHT(), Notes()
    ours = Announcer(dht, AnnouncerOptions("m-hf", 6), make_record, notes)  # type: ignore[arg-type]
    assert ours.last_stored is None
    await ours.announce(ServerState.JOINING, BlockSpan(0, 2))
    stored = ours.last_stored
    assert stored is not None
    assert stored.state is ServerState.JOINING
    dht.is_reachable = False
    with pytest.raises(SwarmError):
        await ours.announce(ServerState.ONLINE, BlockSpan(0, 2))
    assert ours.last_stored == stored
    dht.is_reachable = True
    await ours.renew()
    assert (ours.last_stored.state, notes.announcements) == (ServerState.ONLINE, [True, False, True])
    assert ours.last_stored.at_monotonic_s >= stored.at_monotonic_s


@pytest.mark.parametrize(
    ("error", "code"),
    [(Draining("x"), "draining"), (BadRequest("f", 1, "r"), "bad_request"), (TimeoutError(), "deadline_exceeded"),
     (DeadlineExceeded("x"), "deadline_exceeded"), (KeyError("x"), "internal_error"),
     (SwarmError("x"), "internal_error")],
)  # fmt: skip
async def test_the_code_that_is_told_is_the_one_that_is_sent(error: Exception, code: str) -> None:
    """It begins the text for the peer, and there are no others than CODES."""
    assert wire_code(error) == code
    assert code in CODES
    assert wire_text(error, "rpc_info", "QmPeer").startswith(f"{code}: ")

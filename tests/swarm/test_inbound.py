"""What requests hold of the memory: counted from the first byte until they are answered, and no longer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch
from hivemind.p2p import P2PHandlerError, PeerID

from petalsd.engine.handle import Session
from petalsd.engine.step import PassRequest, SessionSpec
from petalsd.errors import RemoteFailure
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.protocol import MIB, handle_name
from petalsd.swarm.requests import StepMessage
from petalsd.swarm.stream import MessageStream
from petalsd.types import BlockSpan
from tests.engine.rig import states
from tests.swarm.servers import Server, joining, node, server
from tests.swarm.stock import DUMMY, DUMMY_INT64, Request, Response, stock_request
from tests.swarm.test_malformed import good_step, raw_stream
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

PART = 200 * 1024  # small for a frame: not counted on its way


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Server, Node]]:
    """A server whose requests may hold 8 MiB together, and a client."""
    async with (
        node(NodeOptions(max_inbound_bytes=8 * MIB)) as first,
        node(await joining(first, client_mode=True)) as client,
        server(first, tmp_path_factory.mktemp("tiny"), kv_tokens=4096) as tiny,
    ):
        yield tiny, client


def pass_part(uid: str, is_first: bool) -> Request:
    request = stock_request(uid, [states(1, PART // 256)], {})
    if not is_first:
        request.tensors[0].dtype = ""
    return request


@contextlib.asynccontextmanager
async def opened(narrow: tuple[Server, Node], method: str = "rpc_inference") -> AsyncIterator[MessageStream]:
    """A stream to the server; once it is closed, nothing of what it sent is held."""
    tiny, client = narrow
    stream = await raw_stream(tiny, client, method)
    try:
        yield stream
    finally:
        stream.close()
    await tiny.idle()
    assert tiny.node.budget.held_bytes == 0


async def test_parts_of_a_pass_count_until_it_is_answered(narrow: tuple[Server, Node]) -> None:
    """However small they are: peers that send passes and never end them would take all the memory."""
    tiny, _ = narrow
    async with opened(narrow, "rpc_forward_stream") as stream:
        with pytest.raises(RemoteFailure, match="overloaded"):
            for index in range(60):
                await stream.send(pass_part(tiny.uid, is_first=index == 0))
            await stream.receive(Response, 2.0)


def packed(request: Request, num_values: int) -> Request:
    """The same with 8-bit states, a byte for each value."""
    header = (1).to_bytes(8, "little") + bytes(4)
    states_ = request.tensors[0]
    states_.buffer, states_.compression = header + bytes(num_values), 4
    return request


async def test_compressed_parts_count_as_much_as_they_become(narrow: tuple[Server, Node]) -> None:
    """Here four times as much as came, so that a few MiB are too much."""
    tiny, _ = narrow
    async with opened(narrow, "rpc_forward_stream") as stream:
        with pytest.raises(RemoteFailure, match="overloaded"):
            for index in range(12):
                part = pass_part(tiny.uid, is_first=index == 0)
                await stream.send(packed(part, PART) if index == 0 else part)
            await stream.receive(Response, 2.0)


async def test_a_compressed_step_counts_as_much_as_it_becomes(narrow: tuple[Server, Node]) -> None:
    """A client may fill its share of the memory with 8-bit states, and no more than that."""
    tiny, _ = narrow
    request = stock_request(tiny.uid, [states(1, 1), DUMMY, DUMMY_INT64], {"max_length": 4096})
    packed(request, 3 * MIB)
    async with opened(narrow) as stream:
        await stream.send(request)
        with pytest.raises(RemoteFailure, match="overloaded"):
            await stream.receive(Response, 2.0)


async def test_steps_count_until_they_are_answered(narrow: tuple[Server, Node]) -> None:
    """Also the one that is waited for, and one behind it, though more came after them."""
    tiny, _ = narrow
    hog = await tiny.engine.open_session(SessionSpec(BlockSpan(0, 4), 1, 4096, "hog"))
    prompt = [states(1, 12_000), DUMMY, DUMMY_INT64]
    token = [states(1, 1), DUMMY, DUMMY_INT64]
    async with opened(narrow) as stream:
        await stream.send(stock_request(tiny.uid, prompt, {"max_length": 4096, "alloc_timeout": 60.0}))
        await stream.send(stock_request(tiny.uid, prompt, {}))
        await stream.send(stock_request(tiny.uid, token, {}))
        await eventually(lambda: any(len(call._inbox._from_client) == 2 for call in tiny.handler._calls))
        held_bytes = tiny.node.budget.held_bytes
        stream.close()
        await hog.close()
    assert held_bytes >= 2 * prompt[0].nbytes


async def test_a_session_keeps_no_step_that_was_answered(narrow: tuple[Server, Node]) -> None:
    """A prompt's states are large, and sessions live long."""
    tiny, _ = narrow
    async with opened(narrow) as stream:
        prompt = stock_request(tiny.uid, [states(1, 2000), DUMMY, DUMMY_INT64], {"max_length": 2010})
        await good_step(stream, prompt)
        await good_step(stream, stock_request(tiny.uid, [states(1, 1), DUMMY, DUMMY_INT64], {}))
        gc.collect()
        held = [one for one in gc.get_objects() if type(one) is StepMessage]
        assert not held and tiny.node.budget.held_bytes == 0


async def unary(narrow: tuple[Server, Node], method: str, request: Request | bytes) -> bytes:
    """The answer to one message, whatever it holds."""
    tiny, client = narrow
    payload = request if isinstance(request, bytes) else request.SerializeToString()
    peer = PeerID.from_base58(tiny.node.peer_id)
    answer: bytes = await client.p2p._client.call_unary_handler(peer, handle_name(method), payload)
    return answer


@pytest.fixture
def computed(narrow: tuple[Server, Node], monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """No pass is over before it is set."""
    is_computed = asyncio.Event()

    async def forward(request: PassRequest) -> torch.Tensor:
        await is_computed.wait()
        return request.hidden

    monkeypatch.setattr(narrow[0].engine, "forward", forward)
    return is_computed


async def test_passes_in_one_message_count_until_they_are_answered(
    narrow: tuple[Server, Node], computed: asyncio.Event
) -> None:
    """As those of streams do: each holds up to 4 MiB while it waits for the engine."""
    tiny, _ = narrow
    request = stock_request(tiny.uid, [states(1, 12_000), DUMMY], {})
    calls = [asyncio.create_task(unary(narrow, "rpc_forward", request)) for _ in range(2)]
    await eventually(lambda: tiny.node.budget.held_bytes >= 2 * request.ByteSize())
    with pytest.raises(P2PHandlerError, match="overloaded"):
        await unary(narrow, "rpc_forward", request)
    computed.set()
    await asyncio.gather(*calls)
    assert tiny.node.budget.held_bytes == 0


async def test_a_compressed_pass_counts_as_much_as_it_becomes(
    narrow: tuple[Server, Node], computed: asyncio.Event
) -> None:
    """Four times as much as came."""
    request = packed(stock_request(narrow[0].uid, [states(1, 1), DUMMY], {}), 3 * MIB)
    with pytest.raises(P2PHandlerError, match="overloaded"):
        await unary(narrow, "rpc_forward", request)
    assert narrow[0].node.budget.held_bytes == 0


async def test_a_pass_that_its_caller_gives_up_counts_no_more(
    narrow: tuple[Server, Node], computed: asyncio.Event
) -> None:
    tiny, _ = narrow
    request = stock_request(tiny.uid, [states(1, 2000), DUMMY], {})
    call = asyncio.create_task(unary(narrow, "rpc_forward", request))
    await eventually(lambda: tiny.node.budget.held_bytes)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await eventually(lambda: not tiny.node.budget.held_bytes)


@pytest.mark.parametrize("method", ["rpc_forward", "rpc_backward", "rpc_push", "rpc_info"])
async def test_what_is_refused_counts_no_more(narrow: tuple[Server, Node], method: str) -> None:
    for payload in (b"\xff" * MIB, Request(uid="other.0").SerializeToString()):
        with pytest.raises(P2PHandlerError):
            await unary(narrow, method, payload)
        assert narrow[0].node.budget.held_bytes == 0


@pytest.mark.parametrize("method", ["rpc_forward", "rpc_backward", "rpc_push"])
async def test_a_message_of_countless_tensors_is_not_unpacked(
    narrow: tuple[Server, Node], method: str
) -> None:
    """Two bytes each on the wire and fifty times as much in memory: as on streams, it is refused unread."""
    with pytest.raises(P2PHandlerError, match=r"bad_request.*at most 1024 fields"):
        await unary(narrow, method, b"\x12\x00" * MIB)


class Pause:
    """An errand that keeps a session's task until ``go_on``."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, session: Session) -> None:
        await self.go_on.wait()

    def drop(self) -> None:
        self.go_on.set()


@pytest.mark.parametrize("is_closed", [True, False])
async def test_pushed_steps_count_until_they_are_answered(
    narrow: tuple[Server, Node], is_closed: bool
) -> None:
    """They wait for their session beside what its client sent, and go with it."""
    tiny, _ = narrow
    token, metadata = [states(1, 1), DUMMY, DUMMY_INT64], {"max_length": 16, "session_id": "pushed to"}
    pushed = stock_request(tiny.uid, [states(1, 8000), DUMMY, DUMMY_INT64], {"session_id": "pushed to"})
    async with opened(narrow) as stream:
        await good_step(stream, stock_request(tiny.uid, token, metadata))
        (call,), pause = tiny.handler._calls, Pause()
        call.send_on(pause)
        for _ in range(3):
            await unary(narrow, "rpc_push", pushed)
        assert tiny.node.budget.held_bytes >= 3 * pushed.ByteSize()
        with pytest.raises(P2PHandlerError, match="overloaded"):
            await unary(narrow, "rpc_push", pushed)
        if is_closed:
            stream.close()
        pause.go_on.set()
        await eventually(lambda: not tiny.node.budget.held_bytes)

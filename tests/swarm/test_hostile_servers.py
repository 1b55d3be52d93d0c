"""What we call may answer anything: the caller gets a RemoteFailure, and holds little meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from petalsd.errors import BadRequest, RemoteFailure
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import HAND_OVER_METHOD, HAND_OVER_SERVICE, MIB, handle_name
from petalsd.swarm.stub import ServerStub
from tests.swarm.servers import joining, node

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

HAND_OVER = handle_name(HAND_OVER_METHOD, HAND_OVER_SERVICE)
INFERENCE = handle_name("rpc_inference")


def frame(claimed_bytes: int, num_bytes: int) -> bytes:
    """The begin of a message."""
    return b"\0" + claimed_bytes.to_bytes(8, "big") + bytes(num_bytes)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[tuple[Node, Node]]:
    """A hostile server, and one that calls it and holds 8 MiB of answers at most."""

    async def answer(payload: bytes, caller: PeerID) -> bytes:
        return b"\x12\x00" * MIB

    async def flood(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(16 * MIB, 7 * MIB))
        await reader.read()
        writer.close()

    async with (
        node() as hostile,
        node(await joining(hostile, max_inbound_bytes=8 * MIB, max_message_bytes=32 * MIB)) as caller,
    ):
        for method in ("rpc_info", "rpc_push", "rpc_forward"):
            await hostile.p2p._client.add_unary_handler(handle_name(method), answer)
        for name in (HAND_OVER, INFERENCE):
            await hostile.p2p.add_binary_stream_handler(name, flood)
        yield hostile, caller


@pytest.fixture
def stub(pair: tuple[Node, Node]) -> ServerStub:
    return ServerStub(pair[1], pair[0].peer_id)


async def test_an_answer_of_countless_tensors_is_not_unpacked(stub: ServerStub) -> None:
    """Two bytes each on the wire, fifty in memory; any client can have us push to any server."""
    calls = (
        stub.push(runtime_pb2.ExpertRequest(), 10.0),
        stub.forward("m.0", [], {}, 10.0),
    )
    for call in calls:
        with pytest.raises(RemoteFailure, match=r"nonsense.*at most 1024 fields"):
            await call


async def test_a_taker_may_answer_as_much_as_a_ticket_needs(
    pair: tuple[Node, Node], stub: ServerStub
) -> None:
    """Else whoever is listed as a server fills the memory that requests of others need."""
    stream = await stub.open_hand_over()
    with pytest.raises(BadRequest, match="message length = 16777216: at most 65536"):
        await stream.receive(runtime_pb2.ExpertResponse, 5.0)
    assert pair[1].budget.held_bytes == 0
    stream.close()


async def test_a_server_that_answers_more_than_we_can_hold_has_failed(stub: ServerStub) -> None:
    """A client goes on with another one."""
    sessions = [await stub.open_inference() for _ in range(2)]
    results = await asyncio.gather(*(session.receive(2.0) for session in sessions), return_exceptions=True)
    for session in sessions:
        session.abort()
    assert all(isinstance(result, RemoteFailure) for result in results), results
    assert any("overloaded" in str(result) or "under way" in str(result) for result in results)

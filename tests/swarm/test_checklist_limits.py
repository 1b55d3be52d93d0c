"""The interop checklist (protocol.md 10, server): rows whose servers have limits of their own."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from hivemind.p2p import P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.runtime_pb2 import Tensor
from hivemind.utils.multiaddr import Multiaddr

from petalsd.engine.limits import EngineLimits
from petalsd.errors import RemoteFailure
from petalsd.swarm.node import Node
from petalsd.swarm.serving import HandlerLimits
from petalsd.swarm.stream import MessageStream
from tests.engine.rig import states
from tests.numeric import assert_close
from tests.swarm.servers import PREFIX, server
from tests.swarm.stock import DUMMY, Response, StockSession, stock_request
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


async def refused(session: StockSession, match: str) -> None:
    """The session's next answer is an error with this text, at once and not after a client's timeout."""
    with pytest.raises(P2PHandlerError, match=match):
        await session.answer()


async def test_row_12_a_server_that_stops_says_so(
    client: Node, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """Row 12: stopping the handler ends open sessions with an error instead of a silent close."""
    async with server(nodes[0], tmp_path) as stopping:
        session = await stopping.stock_session(client)
        await session.step(stopping.uid, states(1, 3), max_length=8)
        await stopping.handler.stop("the owner stops it")
        await refused(session, "session_closed: the owner stops it")


async def test_row_12_a_client_that_does_not_read_holds_up_no_stop(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """Row 12: the others are told, and it finds its stream closed, with most of its answer unsent."""
    ours, theirs = socket.socketpair()
    async with server(nodes[0], tmp_path) as stopping:

        async def answer(stream: MessageStream) -> None:
            await stream.send(Response(tensors=[Tensor(buffer=bytes(2**24))]))

        handle = stopping.handler._stream_handler("rpc_forward_stream", answer)
        info = StreamInfo(nodes[0].p2p.peer_id, Multiaddr("/ip4/127.0.0.1"), "")
        streaming = asyncio.create_task(handle(info, *await asyncio.open_connection(sock=ours)))
        await eventually(lambda: stopping.handler.num_streams == 1)
        async with asyncio.timeout(5):
            await stopping.handler.stop("the owner stops it")
        await asyncio.gather(streaming, return_exceptions=True)
    theirs.settimeout(5)
    received = 0
    while data := theirs.recv(2**20):
        received += len(data)
    assert received < 2**24
    theirs.close()


async def test_row_12_waiting_too_long_for_a_step_is_an_error(
    client: Node, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """Row 12: the step and session timeouts of a silent client come back as errors too."""
    limits = HandlerLimits(step_timeout_s=0.2)
    async with server(nodes[0], tmp_path, limits=limits) as impatient:
        session = await impatient.stock_session(client)
        await session.step(impatient.uid, states(1, 3), max_length=8)
        await refused(session, "deadline_exceeded: no step came for 0.2 s")


async def test_a_session_that_lasts_too_long_is_ended_with_an_error(
    client: Node, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """The session timeout names itself."""
    limits = HandlerLimits(session_timeout_s=0.3)
    async with server(nodes[0], tmp_path, limits=limits) as impatient:
        session = await impatient.stock_session(client)
        await session.step(impatient.uid, states(1, 3), max_length=8)
        await refused(session, "deadline_exceeded: the session lasted")


async def test_row_13_a_prefill_of_any_size_arrives_in_one_message(
    client: Node, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """Row 13: a first message above the unary limit of 4 MiB is computed and answered whole."""
    hidden = states(40, 450)
    assert hidden.nbytes > 4 * 2**20
    async with server(nodes[0], tmp_path, kv_tokens=40 * 512) as roomy:
        session = await roomy.stock_session(client)
        answer = await session.step(roomy.uid, hidden, max_length=450)
        assert_close(answer[:1], roomy.model.expected(hidden[:1]).detach(), **TOLERANCE, what="row 0")
        assert await session.end()


async def test_row_15_a_prefill_larger_than_a_batch_is_split_inside(
    client: Node, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """Row 15: what stock servers refuse as too large is computed in chunks."""
    hidden = states(1, 90)
    small = EngineLimits(max_batch_tokens=16, prefill_chunk_tokens=8)
    async with server(nodes[0], tmp_path, engine_limits=small) as chunking:
        session = await chunking.stock_session(client)
        answer = await session.step(chunking.uid, hidden, max_length=90)
        assert_close(answer, chunking.model.expected(hidden).detach(), **TOLERANCE, what="chunked")
        assert await session.end()


async def test_only_allowed_peers_are_served(client: Node, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """Sessions and passes of others are refused by name; anybody may ask what is served."""
    stranger = "Qm" + "x" * 44
    request = stock_request(f"{PREFIX}.1", [states(1, 3), DUMMY], {})
    async with server(nodes[0], tmp_path, allowed_peers=[stranger]) as closed:
        refusal = f"not_allowed: {client.peer_id} may not use this server"
        for call in (
            lambda: closed.stock(client).rpc_forward(request, timeout=20),
            lambda: closed.stub(client).backward(closed.uid, [states(1, 3)] * 2 + [DUMMY], {}, timeout_s=20),
        ):
            with pytest.raises((P2PHandlerError, RemoteFailure), match=refusal):
                await call()
        session = await closed.stock_session(client)
        with pytest.raises(P2PHandlerError, match=refusal):
            await session.step(closed.uid, states(1, 3), max_length=8)
        assert (await closed.stub(client).rpc_info())["version"] == "0.1.0"
    async with server(nodes[0], tmp_path, allowed_peers=[stranger, client.peer_id]) as shared:
        session = await shared.stock_session(client)
        await session.step(shared.uid, states(1, 3), max_length=8)
        assert await session.end()

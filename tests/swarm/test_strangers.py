"""Streams of peers that may not have them here: told so at once, and in nobody's way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.multiaddr import Multiaddr

from petalsd.swarm import handler as handler_module
from petalsd.swarm import session_taker
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import HAND_OVER_METHOD
from petalsd.swarm.serving import HandlerLimits
from tests.engine.rig import states
from tests.swarm.servers import Server, server
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

STRANGER, OTHER = ("Qm" + letter * 44 for letter in "st")
STREAMED = ("rpc_inference", "rpc_forward_stream", "rpc_backward_stream")
AT_ONCE_S = 2.0


class RawStream:
    """A stream of any peer as p2pd hands it over; the peer sends nothing and closes nothing."""

    def __init__(self, end: socket.socket, task: asyncio.Task[None]) -> None:
        self._end = end
        self.task = task

    @property
    def is_open(self) -> bool:
        return not self.task.done()

    async def refusal(self) -> str:
        """The error that it is told; empty when it is closed without a word."""
        loop, received = asyncio.get_running_loop(), b""
        async with asyncio.timeout(AT_ONCE_S):
            while len(received) < 9 or len(received) < 9 + int.from_bytes(received[1:9], "big"):
                data = await loop.sock_recv(self._end, 2**16)
                if not data:
                    return ""
                received += data
        return str(RPCError.FromString(received[9:]).message)


@contextlib.asynccontextmanager
async def streams_of(target: Server) -> AsyncIterator[object]:
    """Opens them: ``open_stream(method, peer)``."""
    ends: list[socket.socket] = []
    tasks: list[asyncio.Task[None]] = []

    async def open_stream(method: str, peer: str) -> RawStream:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        ends.append(theirs)
        name = "rpc_take" if method == HAND_OVER_METHOD else method
        handle = target.handler._stream_handler(method, getattr(target.handler, name))
        info = StreamInfo(PeerID.from_base58(peer), Multiaddr("/ip4/127.0.0.1"), "")
        tasks.append(asyncio.create_task(handle(info, *await asyncio.open_connection(sock=ours))))
        return RawStream(theirs, tasks[-1])

    try:
        yield open_stream
    finally:
        for end in ends:
            end.close()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("method", STREAMED)
async def test_a_stranger_that_says_nothing_is_refused_at_once(
    nodes: tuple[Node, Node], tmp_path: Path, method: str
) -> None:
    """It would hold the stream until the step timeout, five minutes."""
    async with server(nodes[0], tmp_path, allowed_peers=[OTHER]) as closed, streams_of(closed) as open_stream:
        stranger, allowed = await open_stream(method, STRANGER), await open_stream(method, OTHER)
        assert (await stranger.refusal()).startswith(f"not_allowed: {STRANGER} may not use this server")
        await eventually(lambda: not stranger.is_open, timeout_s=AT_ONCE_S)
        assert allowed.is_open


async def test_strangers_take_no_room(client: Node, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """However many of their streams are still being refused, those of allowed clients are served."""
    limits = HandlerLimits(max_streams=2, max_streams_per_peer=2)
    async with (
        server(nodes[0], tmp_path, limits=limits, allowed_peers=[client.peer_id]) as closed,
        streams_of(closed) as open_stream,
    ):
        strangers = [await open_stream("rpc_inference", STRANGER) for _ in range(8)]
        assert all([await stranger.refusal() for stranger in strangers])
        session = await closed.stock_session(client)
        await session.step(closed.uid, states(1, 3), max_length=8)
        assert await session.end()


async def test_refused_streams_of_a_peer_keep_out_nobody_else(
    client: Node, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """One has as many open as it may; what it opens beside them counts nowhere."""
    limits = HandlerLimits(max_streams=5, max_streams_per_peer=2)
    async with server(nodes[0], tmp_path, limits=limits) as busy, streams_of(busy) as open_stream:
        streams = [await open_stream("rpc_inference", STRANGER) for _ in range(8)]
        for stream in streams[2:]:
            assert (await stream.refusal()).startswith("overloaded: 2 streams of yours are open here")
        assert all(stream.is_open for stream in streams[:2])
        session = await busy.stock_session(client)
        await session.step(busy.uid, states(1, 3), max_length=8)
        assert await session.end()


async def test_a_flood_of_refused_streams_is_cut_off(
    nodes: tuple[Node, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are told why at a time, and the others of this peer closed: each that is told stays for a second."""
    monkeypatch.setattr(handler_module, "_MAX_REFUSED_PER_PEER", 3)
    async with server(nodes[0], tmp_path, allowed_peers=[OTHER]) as closed, streams_of(closed) as open_stream:
        streams = [await open_stream("rpc_inference", STRANGER) for _ in range(8)]
        refusals = [await stream.refusal() for stream in streams]
        assert [bool(refusal) for refusal in refusals] == [True] * 3 + [False] * 5


async def test_givers_have_a_room_of_their_own(
    client: Node, nodes: tuple[Node, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need not be allowed clients, and must say soon what they offer: they take no stream from those."""
    monkeypatch.setattr(handler_module, "_MAX_TAKEN_PER_PEER", 3)
    monkeypatch.setattr(session_taker, "_OFFER_S", 0.5)
    limits = HandlerLimits(max_streams=2)
    async with (
        server(nodes[0], tmp_path, limits=limits, allowed_peers=[client.peer_id]) as closed,
        streams_of(closed) as open_stream,
    ):
        streams = [await open_stream(HAND_OVER_METHOD, STRANGER) for _ in range(4)]
        assert (await streams[3].refusal()).startswith("overloaded: 3 streams of yours")
        session = await closed.stock_session(client)
        await session.step(closed.uid, states(1, 3), max_length=8)
        assert await session.end()
        assert await streams[0].refusal() == "deadline_exceeded: the call took too long"

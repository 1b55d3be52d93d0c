"""Streams over a socket pair, and small swarms of real nodes on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from petalsd.swarm.frames import take_over
from petalsd.swarm.inbound_budget import InboundBudget
from petalsd.swarm.node import Node
from petalsd.swarm.stream import MessageStream
from tests.swarm.handing_over import Swarm, two_servers
from tests.swarm.servers import Server, joining, node, server

PEER_A, PEER_B = "QmPeerA" + "a" * 39, "QmPeerB" + "b" * 39
GHOST = "Qm" + "g" * 44  # a PeerID that nobody has


@pytest.fixture
async def stream_pair() -> AsyncIterator[tuple[MessageStream, MessageStream]]:
    """Two ends of one stream; each end's budget is 1 MiB per message and 2 MiB in all."""
    ends = []
    for end, peer in zip(socket.socketpair(), (PEER_A, PEER_B), strict=True):
        reader, writer = await asyncio.open_connection(sock=end)
        frames = take_over(reader, writer, InboundBudget(2**20, 2**21))
        ends.append(MessageStream(peer, frames, send_timeout_s=0.5))
    yield ends[0], ends[1]
    for stream in ends:
        stream.close()


@pytest.fixture
async def half_pair() -> AsyncIterator[
    tuple[MessageStream, tuple[asyncio.StreamReader, asyncio.StreamWriter]]
]:
    """A stream as in ``stream_pair``, and the other end as asyncio has it."""
    ours, theirs = socket.socketpair()
    frames = take_over(*await asyncio.open_connection(sock=ours), InboundBudget(2**20, 2**21))
    stream = MessageStream(PEER_B, frames, send_timeout_s=0.5)
    reader, writer = await asyncio.open_connection(sock=theirs)
    yield stream, (reader, writer)
    stream.close()
    writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes() -> AsyncIterator[tuple[Node, Node]]:
    """A full node and a client of its swarm, shared by a module."""
    async with node() as first, node(await joining(first, client_mode=True)) as client:
        yield first, client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_server(
    nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """A server with default limits on the module's full node."""
    async with server(nodes[0], tmp_path_factory.mktemp("tiny")) as running:
        yield running


@pytest.fixture
def client(nodes: tuple[Node, Node]) -> Node:
    """The module's client node."""
    return nodes[1]


@pytest_asyncio.fixture(loop_scope="module")
async def tiny(shared_server: Server) -> AsyncIterator[Server]:
    """The module's server; after each test all its pages must be back."""
    yield shared_server
    await shared_server.idle()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Swarm]:
    """Two servers of the same blocks and a client, shared by a module."""
    async with two_servers(tmp_path_factory.mktemp("tiny")) as swarm:
        yield swarm

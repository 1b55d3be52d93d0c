"""Streams over a socket pair, and small swarms of real nodes on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from petalsd.swarm.stream import InboundBudget, MessageStream

PEER_A, PEER_B = "QmPeerA" + "a" * 39, "QmPeerB" + "b" * 39


@pytest.fixture
async def stream_pair() -> AsyncIterator[tuple[MessageStream, MessageStream]]:
    """Two ends of one stream; each end's budget is 1 MiB per message and 2 MiB in all."""
    ends = []
    for end, peer in zip(socket.socketpair(), (PEER_A, PEER_B), strict=True):
        reader, writer = await asyncio.open_connection(sock=end)
        ends.append(MessageStream(peer, reader, writer, InboundBudget(2**20, 2**21), send_timeout_s=0.5))
    yield ends[0], ends[1]
    for stream in ends:
        stream.close()

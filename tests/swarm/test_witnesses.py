"""Asking others about servers that do not answer us, in a real swarm."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
from hivemind.p2p import P2PContext
from hivemind.proto import dht_pb2

from petalsd.swarm import witnesses
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import REACHABILITY_SERVICE, handle_name
from petalsd.swarm.reachability import ReachabilityService
from petalsd.swarm.witnesses import Witnesses
from tests.swarm.servers import joining, node

pytestmark = pytest.mark.swarm


@contextlib.asynccontextmanager
async def reachable(first: Node) -> AsyncIterator[Node]:
    """A node of the swarm that answers ``rpc_check``, as servers do."""
    async with node(await joining(first)) as one:
        service = ReachabilityService(one)
        await service.start()
        try:
            yield one
        finally:
            await service.stop()


def kill(one: Node) -> str:
    """As a power cut would; who it was."""
    peer, child = one.peer_id, one._daemon._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    return peer


async def test_a_server_that_crashed_is_missed_and_one_that_lives_is_not() -> None:
    """By one witness, which is not deaf itself: it reaches us."""
    async with (
        node() as first,
        reachable(first) as witness,
        reachable(first) as living,
        reachable(first) as crashed,
    ):
        gone = kill(crashed)
        async with reachable(first) as us:
            votes = await Witnesses(us).testify([gone, living.peer_id, "no PeerID"], [witness.peer_id])
        assert votes == {gone: 1, living.peer_id: -1}


async def test_who_finds_nobody_is_no_witness(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says the same of us or of another that we reach; and one that never answers costs a while only."""
    monkeypatch.setattr(witnesses, "_DEADLINE_S", 0.5)
    begun = asyncio.Event()

    async def deny(request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        return dht_pb2.PingResponse(available=False)

    async def hang(request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        begun.set()
        await asyncio.Event().wait()
        return dht_pb2.PingResponse()

    async with node() as first, node(await joining(first)) as deaf, node(await joining(first)) as slow:
        for one, answer in ((deaf, deny), (slow, hang)):
            name = handle_name("rpc_check", REACHABILITY_SERVICE)
            await one.p2p.add_protobuf_handler(name, answer, dht_pb2.PingRequest)
        async with reachable(first) as us, reachable(first) as suspect:
            votes = await Witnesses(us).testify([suspect.peer_id], [deaf.peer_id, slow.peer_id])
        assert begun.is_set() and not votes

"""Unary calls that one side gives up, through real p2pd: the others go on, and nothing is left of them."""

from __future__ import annotations

import asyncio
import math

import pytest
from hivemind.p2p import P2PContext
from hivemind.proto import dht_pb2

from tests.swarm.servers import joining, node
from tests.waiting import eventually

pytestmark = pytest.mark.swarm


async def test_an_answer_to_a_call_that_was_just_cancelled_ends_nothing() -> None:
    """It arrives in the same turn of the loop, before the call's own task has taken notice."""
    async with node() as first, node(await joining(first, client_mode=True)) as second:
        pending = second.p2p._client.control._pending_calls
        ping = asyncio.create_task(second.ping(first.peer_id, 1.0))
        await eventually(lambda: len(pending))
        (call_id,) = pending.keys()
        cancelled = pending[call_id] = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        assert await ping == math.inf
        assert math.isfinite(await second.ping(first.peer_id))


async def test_a_request_that_was_cancelled_is_forgotten() -> None:
    """Its task would be kept for as long as the node lives."""
    async with node() as first, node(await joining(first, client_mode=True)) as second:
        begun = asyncio.Event()

        async def hang(request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
            begun.set()
            await asyncio.Event().wait()
            return dht_pb2.PingResponse()

        await first.p2p.add_protobuf_handler("hang", hang, dht_pb2.PingRequest)
        call = asyncio.create_task(
            second.p2p.call_protobuf_handler(
                first.p2p.peer_id, "hang", dht_pb2.PingRequest(), dht_pb2.PingResponse
            )
        )
        await begun.wait()
        tasks = first.p2p._client.control._handler_tasks
        assert tasks
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await eventually(lambda: not tasks)
        assert math.isfinite(await second.ping(first.peer_id))

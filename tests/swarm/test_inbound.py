"""What requests hold of the memory: counted from the first byte until they are answered, and no longer."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from petalsd.engine.step import SessionSpec
from petalsd.errors import RemoteFailure
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.protocol import MIB
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

"""Messages that bring next to nothing: each costs time, so a peer gets few of them for its bytes."""

from __future__ import annotations

import asyncio
import time

import pytest
from hivemind.p2p import P2PHandlerError
from hivemind.proto import runtime_pb2

from petalsd.errors import BadRequest
from petalsd.swarm import inference_stream
from petalsd.swarm.codec import TensorAssembler
from petalsd.swarm.node import Node
from petalsd.swarm.stream import RemoteError, parse_message
from tests.engine.rig import states
from tests.swarm.servers import Server
from tests.swarm.stock import DUMMY, Request, Response, stock_request
from tests.swarm.test_malformed import good_step, message, raw_stream

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

ANSWER_S = 10.0


def crowded(num_tensors: int) -> Request:
    """Two bytes for each of its tensors."""
    request = message()
    request.tensors.extend([runtime_pb2.Tensor()] * num_tensors)
    return request


@pytest.mark.parametrize("num_bytes", [30 * 1024, 250 * 1024])
async def test_a_small_message_of_countless_tensors_is_not_looked_through(num_bytes: int) -> None:
    """120,000 of them took half a second of everybody's time wherever they were gone through."""
    with pytest.raises(BadRequest, match=r"at most (64 in a message|1024 fields)"):
        parse_message(Request, crowded(num_bytes // 2).SerializeToString())


@pytest.mark.parametrize("method", ["rpc_inference", "rpc_forward_stream"])
async def test_countless_tensors_are_refused_on_any_stream(tiny: Server, client: Node, method: str) -> None:
    stream = await raw_stream(tiny, client, method)
    await stream.send(crowded(120_000))
    with pytest.raises(RemoteError, match="bad_request"):
        await stream.receive(Response, ANSWER_S)
    stream.close()


async def test_countless_tensors_are_refused_in_a_unary_call(tiny: Server, client: Node) -> None:
    with pytest.raises(P2PHandlerError, match=r"bad_request.*at most 64 in a message"):
        await tiny.stock(client).rpc_forward(crowded(10_000), timeout=ANSWER_S)


async def test_parts_of_a_request_bring_something() -> None:
    """A thousand may be small, those after them not; parts of a usual size may be any number."""
    assembler = TensorAssembler(2**30)
    assembler.add(runtime_pb2.Tensor(dtype="float32", buffer=b"1234"))
    with pytest.raises(BadRequest, match="parts"):
        for _ in range(2000):
            assembler.add(runtime_pb2.Tensor(buffer=b"1234"))
    assembler = TensorAssembler(2**30)
    assembler.add(runtime_pb2.Tensor(dtype="float32"))
    for _ in range(4000):
        assembler.add(runtime_pb2.Tensor(buffer=bytes(64 * 1024)))


async def test_parts_without_tensors_are_refused(tiny: Server, client: Node) -> None:
    """They never made a request whole, and each was gone through as long as they came."""
    stream = await raw_stream(tiny, client, "rpc_backward_stream")
    await stream.send(stock_request(tiny.uid, [states(1, 3)], {}))
    await stream.send(Request(uid=tiny.uid))
    with pytest.raises(RemoteError, match="each part of a request brings some"):
        await stream.receive(Response, ANSWER_S)
    stream.close()


async def test_small_parts_leave_others_their_turn(tiny: Server, client: Node) -> None:
    """A flood of them ends in an error, and no session waits for it."""
    session, flood = await raw_stream(tiny, client), await raw_stream(tiny, client, "rpc_forward_stream")
    await good_step(session, message(max_length=64))
    await flood.send(stock_request(tiny.uid, [states(1, 3), DUMMY], {}))
    part = Request(uid=tiny.uid, tensors=[runtime_pb2.Tensor(buffer=b"1234")])
    for _ in range(1500):
        await flood.send(part)
    started = time.monotonic()
    await good_step(session, message())
    assert time.monotonic() - started < ANSWER_S
    with pytest.raises(RemoteError, match="parts"):
        await flood.receive(Response, ANSWER_S)
    for stream in (session, flood):
        stream.close()


async def test_steps_that_are_answered_already_are_not_taken_for_ever(tiny: Server, client: Node) -> None:
    """Some are, as a client sends the steps that were pushed here, too; an answered one makes them forgotten."""
    stream = await raw_stream(tiny, client)
    for number in range(3):
        request = message(max_length=64, step_id=f"step {number}")
        await good_step(stream, request)
        for _ in range(inference_stream._MAX_REPEATED):
            await stream.send(request)
    await stream.send(request)
    with pytest.raises(RemoteError, match=r"bad_request.*answered already"):
        await stream.receive(Response, ANSWER_S)
    stream.close()


async def test_repeated_steps_leave_others_their_turn(
    tiny: Server, client: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while one after the other has arrived: the loop goes round between any two."""
    monkeypatch.setattr(inference_stream, "_MAX_REPEATED", 10**6)
    turns, skips = 0, []
    skip = inference_stream.InferenceCall._skip

    async def noted(call: inference_stream.InferenceCall, repeated: inference_stream.StepMessage) -> None:
        skips.append(turns)
        await skip(call, repeated)

    monkeypatch.setattr(inference_stream.InferenceCall, "_skip", noted)
    stream = await raw_stream(tiny, client)
    request = message(max_length=64, step_id="step")
    await good_step(stream, request)
    for _ in range(200):
        await stream.send(request)
    while len(skips) < 200:
        turns += 1
        await asyncio.sleep(0)
    assert len(set(skips)) == 200
    stream.close()

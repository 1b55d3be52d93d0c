"""Messages over a stream: framing, bounds, ends."""

from __future__ import annotations

import asyncio
import socket

import pytest
import torch
from hivemind.p2p import P2P
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, Tensor

from petalsd.errors import BadRequest, DeadlineExceeded, Overloaded
from petalsd.swarm.frames import take_over
from petalsd.swarm.inbound_budget import InboundBudget
from petalsd.swarm.observer import NullObserver
from petalsd.swarm.stream import MessageStream, RemoteError, StreamEnded
from petalsd.swarm.stub import InferenceStream
from tests.waiting import eventually

Pair = tuple[MessageStream, MessageStream]
HalfPair = tuple[MessageStream, tuple[asyncio.StreamReader, asyncio.StreamWriter]]


def large(num_bytes: int = 600_000) -> ExpertRequest:
    return ExpertRequest(uid="u", tensors=[Tensor(buffer=b"x" * num_bytes)])


@pytest.mark.parametrize("message", [ExpertRequest(), ExpertRequest(uid="u"), large()])
async def test_messages_arrive_as_they_were_sent(stream_pair: Pair, message: ExpertRequest) -> None:
    """Small and large messages, several in a row, both ways."""
    for sender, receiver in (stream_pair, stream_pair[::-1]):
        for _ in range(2):
            sending = asyncio.create_task(sender.send(message))
            assert await receiver.receive(ExpertRequest) == message
            await sending


async def test_a_large_answer_tells_how_long_the_peer_took_to_read_it() -> None:
    """Less what sockets may hold; small ones, and large ones that nobody had to wait for, tell nothing."""
    flows: list[tuple[int, float, bool]] = []

    class Observer(NullObserver):
        def flowed(self, num_bytes: int, seconds: float, *, is_upload: bool) -> None:
            flows.append((num_bytes, seconds, is_upload))

    ours, theirs = socket.socketpair()
    frames = take_over(*await asyncio.open_connection(sock=ours), InboundBudget(2**20, 2**21))
    stream = MessageStream("peer", frames, 5.0, Observer())
    reader, writer = await asyncio.open_connection(sock=theirs)
    await stream.send(ExpertRequest(uid="small"))
    message = large(8 * 2**20)
    sending = asyncio.create_task(stream.send(message))
    assert (await P2P.receive_protobuf(ExpertRequest, reader))[0].uid == "small"
    assert (await P2P.receive_protobuf(ExpertRequest, reader))[0] == message
    await sending
    stream.close()
    writer.close()
    ((num_bytes, seconds, is_upload),) = flows
    assert 4 * 2**20 <= num_bytes < 4 * 2**20 + 1000 and 0 < seconds < 5 and is_upload


async def test_the_framing_is_hiveminds(half_pair: HalfPair) -> None:
    """hivemind's own functions read what we write and write what we read."""
    ours, (reader, writer) = half_pair
    await ours.send(ExpertRequest(uid="a"))
    assert (await P2P.receive_protobuf(ExpertRequest, reader))[0].uid == "a"
    await ours.send_error("broken")
    assert (await P2P.receive_protobuf(ExpertRequest, reader))[1].message == "broken"
    await P2P.send_protobuf(ExpertRequest(uid="b"), writer)
    assert (await ours.receive(ExpertRequest)).uid == "b"
    await P2P.send_protobuf(P2P.END_OF_STREAM, writer)
    assert await ours.receive(ExpertRequest) is None


async def test_an_error_of_the_peer_is_raised_with_its_text(stream_pair: Pair) -> None:
    """Behind the peer whose text it is."""
    await stream_pair[0].send_error("out_of_pages: 5 of 4")
    with pytest.raises(RemoteError) as failure:
        await stream_pair[1].receive(ExpertRequest)
    assert failure.value.message == f"{failure.value.peer}: out_of_pages: 5 of 4"


async def test_a_peer_that_closes_ends_the_stream(stream_pair: Pair) -> None:
    """Both receiving and sending say so."""
    stream_pair[0].close()
    with pytest.raises(StreamEnded):
        await stream_pair[1].receive(ExpertRequest)
    with pytest.raises(StreamEnded):
        for _ in range(3):
            await stream_pair[1].send(large(100_000))


async def test_a_peer_that_does_not_read_is_given_up(stream_pair: Pair) -> None:
    """Sending has a deadline."""
    with pytest.raises(DeadlineExceeded, match="did not read"):
        for _ in range(10):
            await stream_pair[0].send(large(1_000_000))


async def test_a_message_above_the_limit_is_refused_unread(half_pair: HalfPair) -> None:
    """The length alone decides."""
    ours, (_, writer) = half_pair
    writer.write(b"\0" + (2**20 + 1).to_bytes(8, "big"))
    with pytest.raises(BadRequest, match="message length"):
        await ours.receive(ExpertRequest)


async def test_finishing_delivers_what_was_written_last() -> None:
    """With input unread, a plain close would drop the last answer; finish waits until the peer has it."""
    is_finished = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = MessageStream("QmCaller", take_over(reader, writer, InboundBudget(2**20, 2**21)), 1.0)
        await stream.receive(ExpertRequest)
        await stream.send_error("refused")
        await stream.finish()
        is_finished.set()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    caller = MessageStream("QmServer", take_over(reader, writer, InboundBudget(2**20, 2**21)), 1.0)
    for _ in range(20):
        await caller.send(large(50_000))
    with pytest.raises(RemoteError, match="refused"):
        await caller.receive(ExpertRequest)
    caller.close()
    await is_finished.wait()
    server.close()
    await server.wait_closed()


async def test_a_stream_that_failed_is_closed_by_the_peer_first(half_pair: HalfPair) -> None:
    """What it sends meanwhile must find the stream open, or libp2p's daemon drops the error."""
    ours, (reader, writer) = half_pair
    await ours.send_error("refused")
    closing = asyncio.create_task(ours.close_after_peer())
    assert (await P2P.receive_protobuf(ExpertResponse, reader))[1].message == "refused"
    await P2P.send_protobuf(large(), writer)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reader.at_eof() and not closing.done()
    writer.close()
    await closing
    with pytest.raises(StreamEnded):
        await ours.send(ExpertRequest())


async def test_bytes_on_their_way_in_are_bounded_together() -> None:
    """What all streams hold is counted, given back, and never more than allowed."""
    budget = InboundBudget(10, 100)
    budget.take(60)
    with pytest.raises(Overloaded, match="60 bytes"):
        budget.take(41)
    budget.give_back(60)
    budget.take(100)
    assert budget.held_bytes == 100


async def test_a_closed_stream_holds_nothing(stream_pair: Pair) -> None:
    """The bytes of a received message are given back by the next call and by close."""
    sender, receiver = stream_pair
    sending = asyncio.create_task(sender.send(large()))
    await receiver.receive(ExpertRequest)
    await sending
    budget = receiver._frames._budget
    assert budget.held_bytes > 600_000
    receiver.close()
    receiver.close()
    assert budget.held_bytes == 0


async def test_why_a_server_ended_a_session_is_heard_before_the_next_step(stream_pair: Pair) -> None:
    """It says so when nobody asks, and closes; a step sent into that would only find the stream closed."""
    server, client = stream_pair
    session = InferenceStream(client)
    await server.send_error("session_closed: the deadline is over")
    server.close()
    await eventually(lambda: client.has_arrived)
    with pytest.raises(RemoteError, match="session_closed: the deadline is over"):
        await session.send("m.0", [torch.zeros(1, 1, 4)], {})


async def test_a_session_that_goes_on_is_not_kept_waiting(stream_pair: Pair) -> None:
    """Looking for bad news takes nothing from the answers, and no time."""
    server, client = stream_pair
    session = InferenceStream(client)
    for _ in range(3):
        await session.send("m.0", [torch.zeros(1, 1, 4)], {})
        request = await server.receive(ExpertRequest)
        assert request is not None
        await server.send(ExpertResponse(tensors=request.tensors))
        assert [tensor.shape for tensor in await session.receive(1.0)] == [(1, 1, 4)]


async def test_a_message_of_countless_fields_is_not_parsed(stream_pair: Pair) -> None:
    """An empty tensor takes two bytes on the wire and fifty in memory; large messages have a few fields."""
    sender, receiver = stream_pair
    flood = ExpertRequest(tensors=[Tensor()] * 200_000)
    sending = asyncio.create_task(sender.send(flood))
    with pytest.raises(BadRequest, match="fields"):
        await receiver.receive(ExpertRequest)
    await sending

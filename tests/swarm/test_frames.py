"""Frames under a stream of messages: how bytes become frames, what is held meanwhile, and when reading stops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalsd.errors import BadRequest, Overloaded
from petalsd.swarm.frames import ERROR, MESSAGE, FrameProtocol, take_over
from petalsd.swarm.inbound_budget import InboundBudget
from tests.waiting import eventually

LARGE = 300_000


class Wire:
    """A transport that only notes whether it is read from."""

    def __init__(self) -> None:
        self.is_reading = True
        self.transport = self

    def get_protocol(self) -> None:
        return None

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


def frames_of(wire: Wire, budget: InboundBudget | None = None) -> FrameProtocol:
    return FrameProtocol(wire, budget or InboundBudget(2**20, 2**21))  # type: ignore[arg-type]


def packed(marker: int, payload: bytes) -> bytes:
    return bytes((marker,)) + len(payload).to_bytes(8, "big") + payload


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([MESSAGE, ERROR]), st.binary(max_size=40)), max_size=6), st.data())
async def test_frames_come_out_however_the_bytes_are_cut(
    sent: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    """In order, each once; the end comes after the last."""
    wire = b"".join(packed(*frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    frames, received = frames_of(Wire()), []
    for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        frames.data_received(wire[begin:end])
        while frames.has_arrived:
            received.append(frames.take())
    assert received == sent
    frames.eof_received()
    with pytest.raises(EOFError):
        frames.take()


async def test_reading_stops_when_much_lies_behind_a_frame_that_nobody_takes() -> None:
    """And goes on when it is taken."""
    wire = Wire()
    frames = frames_of(wire)
    frames.data_received(packed(MESSAGE, b"first"))
    assert wire.is_reading
    frames.data_received(packed(MESSAGE, b"x" * LARGE))
    assert not wire.is_reading
    assert frames.take() == (MESSAGE, b"first")
    assert wire.is_reading
    assert frames.take() == (MESSAGE, b"x" * LARGE)


async def test_a_large_frame_counts_from_when_it_comes_until_the_next_is_taken() -> None:
    budget = InboundBudget(2**20, 2**21)
    frames = frames_of(Wire(), budget)
    large = packed(MESSAGE, b"x" * LARGE)
    frames.data_received(large[: 9 + 1000])
    assert budget.held_bytes == 1000
    frames.data_received(large[9 + 1000 :] + packed(MESSAGE, b"small"))
    assert budget.held_bytes == LARGE
    frames.take()
    assert budget.held_bytes == LARGE
    frames.take()
    assert budget.held_bytes == 0


async def test_what_exceeds_the_budget_is_told_and_not_read() -> None:
    wire, budget = Wire(), InboundBudget(2**20, LARGE)
    budget.take(1000)
    frames = frames_of(wire, budget)
    frames.data_received(packed(MESSAGE, b"x" * LARGE))
    assert not wire.is_reading
    with pytest.raises(Overloaded):
        frames.take()
    frames.release()
    assert budget.held_bytes == 1000


async def test_a_damaged_frame_is_told_after_the_good_ones() -> None:
    frames = frames_of(Wire())
    frames.data_received(packed(MESSAGE, b"good") + packed(7, b"bad"))
    assert frames.take() == (MESSAGE, b"good")
    for _ in range(2):
        with pytest.raises(BadRequest, match="marker"):
            frames.take()


@pytest.fixture
async def ends() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamWriter]]:
    """Both of asyncio's streams of one end, and the other end's writer."""
    one, other = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=one)
    _, peer = await asyncio.open_connection(sock=other)
    yield reader, writer, peer
    writer.close()
    peer.close()


async def test_taking_over_loses_nothing_that_was_read(
    ends: tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamWriter],
) -> None:
    """Bytes that asyncio's reader holds, also half a frame, come before those that arrive later."""
    reader, writer, peer = ends
    peer.write(b"hello" + packed(MESSAGE, b"one") + packed(MESSAGE, b"two")[:4])
    assert await reader.readexactly(5) == b"hello"
    await asyncio.sleep(0)
    frames = take_over(reader, writer, InboundBudget(2**20, 2**21))
    peer.write(packed(MESSAGE, b"two")[4:])
    peer.write_eof()
    await eventually(lambda: frames.has_arrived)
    assert frames.take() == (MESSAGE, b"one")
    await eventually(lambda: frames.has_arrived)
    assert frames.take() == (MESSAGE, b"two")
    await frames.has_ended.wait()


async def test_taking_over_what_has_ended(
    ends: tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamWriter],
) -> None:
    """The last frames are there, then the end."""
    reader, writer, peer = ends
    peer.write(packed(MESSAGE, b"last"))
    peer.close()
    await peer.wait_closed()
    await eventually(lambda: reader._eof)
    frames = take_over(reader, writer, InboundBudget(2**20, 2**21))
    assert frames.take() == (MESSAGE, b"last")
    with pytest.raises(EOFError):
        frames.take()


async def test_what_is_kept_counts_until_it_is_let_go() -> None:
    """A large frame as it is, a small one as much as is said; once only, and not after the release."""
    budget = InboundBudget(2**20, 2**21)
    frames = frames_of(Wire(), budget)
    frames.data_received(packed(MESSAGE, b"x" * LARGE) + packed(MESSAGE, b"small") * 3)
    frames.take()
    assert frames.keep() == LARGE
    frames.take()
    assert frames.keep() == 0
    frames.take()
    assert frames.keep(at_least=500) == 500
    assert budget.held_bytes == LARGE + 500
    frames.let_go(LARGE)
    assert budget.held_bytes == 500
    with pytest.raises(Overloaded):
        frames.keep(at_least=2**21)
    frames.release()
    frames.let_go(500)
    assert budget.held_bytes == 0

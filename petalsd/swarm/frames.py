"""One connection as frames: what lies between the transport and ``stream``'s messages.

    marker (1 byte), length of the payload (8 bytes, big-endian), payload

asyncio's own streams would copy the bytes once more and wake a task to look at the header and another time for the
payload. Here the transport's call completes the frame, and whoever is told of it takes it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import cast

from petalsd.errors import BadRequest, PetalsdError
from petalsd.swarm.inbound_budget import Budget

MESSAGE, ERROR = 0, 1
HEADER_BYTES = 9
LARGE_BYTES = 256 * 1024
_AHEAD_BYTES = 256 * 1024
_MAX_ERROR_BYTES = 64 * 1024

Frame = tuple[int, bytes | memoryview]


class FrameProtocol(asyncio.Protocol):
    """Completes one frame ahead, and stops reading when more than a little lies behind it.

    The bytes of a large frame count against the budget as they come, until the next is taken or ``release``; those
    of frames that are kept for longer, until they are let go.
    """

    def __init__(self, writer: asyncio.StreamWriter, budget: Budget) -> None:
        self._writer = writer  # it closes the transport when nobody holds it any more
        self.transport = transport = cast(asyncio.Transport, writer.transport)
        self.on_arrival: Callable[[], None] | None = None
        self.on_large: Callable[[int, float], None] | None = (
            None  # how much of a frame came, in how many seconds
        )
        self.has_ended = asyncio.Event()
        self._predecessor = transport.get_protocol()
        self._budget = budget
        self._buffer = bytearray()
        self._frame: Frame | None = None
        self._end: Exception | None = None
        self._failure: Exception | None = None
        self._coming_bytes = self._taken_bytes = self._kept_bytes = 0
        self._coming_since = (0.0, 0)
        self._is_reading = True
        self._is_discarding = False
        self._may_write = asyncio.Event()
        self._may_write.set()

    # What the stream asks

    @property
    def has_arrived(self) -> bool:
        """Whether ``take`` has something to say: a frame, or why there are no more."""
        return self._frame is not None or self._failure is not None

    def take(self) -> Frame:
        """The frame that has arrived. EOFError or OSError: the connection is over; BadRequest, Overloaded."""
        self._budget.give_back(self._taken_bytes)
        self._taken_bytes = 0
        frame = self._frame
        if frame is None:
            raise self._failure or BlockingIOError("no frame has arrived")
        self._frame = None
        self._taken_bytes, self._coming_bytes = self._coming_bytes, 0
        self._advance()
        return frame

    def keep(self, at_least: int = 0) -> int:
        """What the frame taken last counts, now ``at_least`` so much, counts until it is let go; how much it is.

        Overloaded when that is too much.
        """
        more = max(0, at_least - self._taken_bytes)
        self._budget.take(more)
        num_bytes, self._taken_bytes = self._taken_bytes + more, 0
        self._kept_bytes += num_bytes
        return num_bytes

    def keep_more(self, num_bytes: int) -> None:
        """Count so much that came another way, until it is let go. Overloaded when that is too much."""
        self._budget.take(num_bytes)
        self._kept_bytes += num_bytes

    def let_go(self, num_bytes: int) -> None:
        """Of what is kept; harmless after ``release``."""
        num_bytes = min(num_bytes, self._kept_bytes)
        self._budget.give_back(num_bytes)
        self._kept_bytes -= num_bytes

    def write(self, marker: int, payload: bytes) -> int:
        """Send a frame, as far as the peer reads; the number of its bytes. OSError or RuntimeError: it is gone."""
        if self.transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        header = bytes((marker,)) + len(payload).to_bytes(8, "big")
        if len(payload) < LARGE_BYTES:
            self.transport.write(header + payload)
        else:
            self.transport.write(header)
            self.transport.write(payload)
        return HEADER_BYTES + len(payload)

    @property
    def may_write(self) -> bool:
        """False while too much waits for the peer to read it."""
        return self._may_write.is_set()

    async def drain(self) -> None:
        """Wait until the peer has read most of what was written. OSError when it is gone."""
        await self._may_write.wait()
        if self.transport.is_closing():
            raise ConnectionResetError("the connection is closed")

    def discard(self) -> None:
        """Read on, and keep nothing of it."""
        self._is_discarding = True
        self._buffer.clear()
        self._set_reading(True)

    def release(self) -> None:
        """Give back what frames hold of the budget."""
        self._budget.give_back(self._taken_bytes + self._coming_bytes + self._kept_bytes)
        self._taken_bytes = self._coming_bytes = self._kept_bytes = 0

    # What the transport tells

    def data_received(self, data: bytes) -> None:
        if self._is_discarding:
            return
        self._buffer += data
        self._advance()
        self._tell()

    def eof_received(self) -> bool:
        """The peer sends no more, but may still read."""
        self.finish(EOFError("the peer has ended its side"))
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._may_write.set()
        self.finish(error or EOFError("the connection is closed"))
        if self._predecessor is not None:
            self._predecessor.connection_lost(error)

    def finish(self, end: Exception) -> None:
        """No more bytes come."""
        self._end = self._end or end
        self.has_ended.set()
        self._advance()
        self._tell()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    # Inside

    def _tell(self) -> None:
        if self.on_arrival is not None and self.has_arrived:
            self.on_arrival()

    def _advance(self) -> None:
        """Complete the next frame, unless the last one is still there."""
        if not self.has_arrived:
            try:
                self._frame = self._next_frame()
            except PetalsdError as error:
                self._failure = error
            if self._frame is None and self._failure is None:
                self._failure = self._end
        self._set_reading(
            self._failure is None and (self._frame is None or len(self._buffer) <= _AHEAD_BYTES)
        )

    def _next_frame(self) -> Frame | None:
        buffer = self._buffer
        if len(buffer) < HEADER_BYTES:
            return None
        marker, length = buffer[0], int.from_bytes(buffer[1:HEADER_BYTES], "big")
        end = HEADER_BYTES + length
        self._check(marker, length)
        if length > LARGE_BYTES:
            here = min(len(buffer), end) - HEADER_BYTES
            if not self._coming_bytes:
                self._coming_since = time.monotonic(), here
            self._budget.take(here - self._coming_bytes)
            self._coming_bytes = here
        if len(buffer) < end:
            return None
        if length > LARGE_BYTES and self.on_large is not None:
            since, first_bytes = self._coming_since
            self.on_large(length - first_bytes, time.monotonic() - since)
        if len(buffer) == end and length > LARGE_BYTES:
            self._buffer = bytearray()
            return marker, memoryview(buffer)[HEADER_BYTES:]
        payload = bytes(memoryview(buffer)[HEADER_BYTES:end])
        del buffer[:end]
        return marker, payload

    def _check(self, marker: int, length: int) -> None:
        if marker not in (MESSAGE, ERROR):
            raise BadRequest("stream marker", bytes((marker,)), "0 for a message, 1 for an error")
        limit = self._budget.max_message_bytes if marker == MESSAGE else _MAX_ERROR_BYTES
        if length > limit:
            raise BadRequest("message length", length, f"at most {limit} bytes")

    def _set_reading(self, is_reading: bool) -> None:
        if is_reading == self._is_reading or self.transport.is_closing():
            return
        self._is_reading = is_reading
        if is_reading:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()


def take_over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: Budget) -> FrameProtocol:
    """The connection under a pair of asyncio's streams, and what they have read of it. They are of no use then."""
    frames = FrameProtocol(writer, budget)
    for data in _already_read(reader):
        frames.data_received(data)
    frames.transport.set_protocol(frames)
    if (error := reader.exception()) is not None or reader.at_eof():
        frames.finish(error or EOFError("the peer has ended its side"))
    return frames


def _already_read(reader: asyncio.StreamReader) -> Iterator[bytes]:
    """What a reader hands out without waiting."""
    while reader.exception() is None and not reader.at_eof():
        reading = reader.read(LARGE_BYTES)
        try:
            reading.send(None)
        except StopIteration as done:
            yield cast(bytes, done.value)
        else:
            reading.close()
            return

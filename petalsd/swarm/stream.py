"""One stream between two peers as whole messages, framed as hivemind frames them.

    message   marker 0x00, 8-byte big-endian length, protobuf bytes
    error     marker 0x01, 8-byte big-endian length, RPCError; with an empty text it ends the sender's side

hivemind's own stream handlers are not used: they read messages of any size, learn of a caller's death only
through garbage collection, and hang a caller whose peer closes without a word. Here the owner of a stream
reads, writes, bounds and closes it in plain sight.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from hivemind.proto.p2pd_pb2 import RPCError

from petalsd import errors
from petalsd.errors import BadRequest, DeadlineExceeded, Overloaded, RemoteFailure
from petalsd.swarm.observer import NullObserver, SwarmObserver

_MESSAGE, _ERROR = b"\x00", b"\x01"
_HEADER_BYTES = 9
_READ_BYTES = 256 * 1024
_MAX_ERROR_BYTES = 64 * 1024
_LINGER_S = 1.0

M = TypeVar("M", bound=Message)
_CODES = frozenset(
    error.code
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.PetalsdError)
)


class RemoteError(RemoteFailure):
    """The peer answered with an error. ``remote_code`` is petalsd's code (``bad_request``, ...), "" of others."""

    def __init__(self, peer: str, text: str) -> None:
        super().__init__(peer, text)
        code = text.partition(":")[0]
        self.remote_code = code if code in _CODES else ""


class StreamEnded(RemoteFailure):
    """The peer closed the stream, or died."""


class InboundBudget:
    """Bytes of large messages that all streams of a node hold while receiving them."""

    def __init__(self, max_message_bytes: int, max_total_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self._max_total_bytes = max_total_bytes
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def take(self, num_bytes: int) -> None:
        if self._held_bytes + num_bytes > self._max_total_bytes:
            raise Overloaded(
                f"{self._held_bytes} bytes of requests are under way, the limit is {self._max_total_bytes}",
                hint="try again later or use another server",
            )
        self._held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._held_bytes -= num_bytes


class MessageStream:
    """The caller's or the server's end. One task may receive while another sends."""

    def __init__(
        self,
        peer: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        budget: InboundBudget,
        send_timeout_s: float,
        observer: SwarmObserver | None = None,
    ) -> None:
        self.peer = peer
        self._reader = reader
        self._writer = writer
        self._budget = budget
        self._send_timeout_s = send_timeout_s
        self._observer = observer or NullObserver()
        self._held_bytes = 0

    async def send(self, message: Message) -> None:
        """Write one message; StreamEnded when the peer is gone, DeadlineExceeded when it does not read."""
        await self._write(_MESSAGE, message.SerializeToString())

    async def send_error(self, text: str) -> None:
        """Tell the peer that the call failed; nothing may follow."""
        await self._write(_ERROR, RPCError(message=text).SerializeToString())

    async def send_end(self) -> None:
        """Tell the peer that nothing more comes from this side."""
        await self._write(_ERROR, b"")

    async def receive(self, message_type: type[M]) -> M | None:
        """The next message; None when the peer ended its side.

        StreamEnded when the stream is closed, RemoteError with the peer's text when it sent an error,
        BadRequest when the framing or the message is damaged or too large. The bytes of a large message
        count against the budget until the next call or ``close``.
        """
        self._release()
        try:
            header = await self._reader.readexactly(_HEADER_BYTES)
            marker, length = header[:1], int.from_bytes(header[1:], "big")
            payload = await self._read_payload(marker, length)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise StreamEnded(self.peer, "closed the stream") from error
        self._observer.received(len(header) + len(payload))
        if marker == _ERROR:
            text = _parse(RPCError, payload).message
            if not text:
                return None
            raise RemoteError(self.peer, text)
        return _parse(message_type, payload)

    async def finish(self) -> None:
        """Close after everything written has reached the peer, waiting a second at most for its side.

        A socket closed with unread input would drop what we wrote last, often the very error.
        """
        with contextlib.suppress(TimeoutError, OSError, RuntimeError):
            async with asyncio.timeout(_LINGER_S):
                self._writer.write_eof()
                while await self._reader.read(_READ_BYTES):
                    pass
        self.close()

    def close(self) -> None:
        """Close at once; idempotent."""
        self._release()
        self._writer.close()

    async def _write(self, marker: bytes, payload: bytes) -> None:
        header = marker + len(payload).to_bytes(8, "big")
        try:
            async with asyncio.timeout(self._send_timeout_s):
                self._writer.write(header + payload if len(payload) < _READ_BYTES else header)
                if len(payload) >= _READ_BYTES:
                    self._writer.write(payload)
                await self._writer.drain()
        except TimeoutError:
            self._writer.transport.abort()  # what it has not read would wait in memory
            raise DeadlineExceeded(f"the peer did not read for {self._send_timeout_s:g} s") from None
        except (OSError, RuntimeError) as error:
            raise StreamEnded(self.peer, "closed the stream") from error
        self._observer.sent(len(header) + len(payload))

    async def _read_payload(self, marker: bytes, length: int) -> bytes:
        limit = self._budget.max_message_bytes if marker == _MESSAGE else _MAX_ERROR_BYTES
        if marker not in (_MESSAGE, _ERROR):
            raise BadRequest("stream marker", marker, "0 for a message, 1 for an error")
        if length > limit:
            raise BadRequest("message length", length, f"at most {limit} bytes")
        if length <= _READ_BYTES:
            return await self._reader.readexactly(length)
        data = bytearray()
        while len(data) < length:
            chunk = await self._reader.read(min(_READ_BYTES, length - len(data)))
            if not chunk:
                raise asyncio.IncompleteReadError(b"", length)
            self._budget.take(len(chunk))
            self._held_bytes += len(chunk)
            data += chunk
        return bytes(data)

    def _release(self) -> None:
        self._budget.give_back(self._held_bytes)
        self._held_bytes = 0


def _parse(message_type: type[M], payload: bytes) -> M:
    try:
        message: M = message_type.FromString(payload)
    except DecodeError:
        raise BadRequest("message", f"{len(payload)} bytes", f"not a {message_type.__name__}") from None
    return message

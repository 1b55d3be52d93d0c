"""One stream between two peers as whole messages, framed as hivemind frames them.

    message   a frame with marker 0: protobuf bytes
    error     a frame with marker 1: RPCError; with an empty text it ends the sender's side

hivemind's own stream handlers are not used: they read messages of any size, learn of a caller's death only
through garbage collection, and hang a caller whose peer closes without a word. Here the owner of a stream
reads, writes, bounds and closes it in plain sight.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from hivemind.proto.p2pd_pb2 import RPCError

from petalsd.alarm import Alarm
from petalsd.errors import BadRequest, DeadlineExceeded, RemoteFailure, SessionMoved
from petalsd.swarm.frames import ERROR, HEADER_BYTES, MESSAGE, FrameProtocol
from petalsd.swarm.observer import NullObserver, SwarmObserver
from petalsd.swarm.protocol import MAX_TENSORS
from petalsd.swarm.wire_fields import has_more_fields

_LINGER_S = 1.0
_MAX_FIELDS = 1024  # of a message that is not small; a step has five
_LOOKED_THROUGH_BYTES = 32 * 1024  # a smaller one is parsed at once in any case
_ON_THE_WAY_BYTES = 4 * 2**20  # sockets and p2pd may hold so much that the peer has not got yet

M = TypeVar("M", bound=Message)


class RemoteError(RemoteFailure):
    """The peer answered with an error. ``moved``: it handed the session on, and says where."""

    def __init__(self, peer: str, text: str) -> None:
        self.moved = SessionMoved.parse(text)
        # The ticket is a secret: what is shown and logged goes without it.
        super().__init__(peer, text if self.moved is None else f"{self.moved.code}: {self.moved.message}")


class StreamEnded(RemoteFailure):
    """The peer closed the stream, or died."""


class NoAnswer(RemoteFailure):
    """The peer did not answer in time; the stream is as it was."""


class MessageStream:
    """The caller's or the server's end. One task may receive while another sends."""

    def __init__(
        self, peer: str, frames: FrameProtocol, send_timeout_s: float, observer: SwarmObserver | None = None
    ) -> None:
        self.peer = peer
        self._frames = frames
        self._send_timeout_s = send_timeout_s
        self._observer = observer or NullObserver()
        frames.on_large = partial(self._observer.flowed, is_upload=False)
        self._waiter: asyncio.Future[None] | None = None
        self._patience = Alarm(self._lose_patience)

    async def send(self, message: Message) -> None:
        """Write one message; StreamEnded when the peer is gone, DeadlineExceeded when it does not read."""
        await self._write(MESSAGE, message.SerializeToString())

    async def send_error(self, text: str) -> None:
        """Tell the peer that the call failed; only ``close_after_peer`` may follow."""
        await self._write(ERROR, RPCError(message=text).SerializeToString())

    async def send_end(self) -> None:
        """Tell the peer that nothing more comes from this side."""
        await self._write(ERROR, b"")

    async def receive(self, message_type: type[M], timeout_s: float | None = None) -> M | None:
        """``take`` as soon as something has arrived; TimeoutError when nothing does in time."""
        if not self._frames.has_arrived:
            await self._arrival(timeout_s)
        return self.take(message_type)

    @property
    def has_arrived(self) -> bool:
        """Whether ``take`` has something to say."""
        return self._frames.has_arrived

    def when_arrived(self, tell: Callable[[], None] | None) -> None:
        """Call ``tell`` whenever something has arrived, from now on and instead of waking ``receive``."""
        self._frames.on_arrival = tell

    def take(self, message_type: type[M]) -> M | None:
        """The message that has arrived; None when the peer ended its side.

        StreamEnded when the stream is closed, RemoteError with the peer's text when it sent an error,
        BadRequest when the framing or the message is damaged or too large. The bytes of a large message
        count against the budget until the next is taken or ``close``, unless they are kept.
        """
        try:
            marker, payload = self._frames.take()
        except (EOFError, OSError) as error:
            raise StreamEnded(self.peer, "closed the stream") from error
        self._observer.received(HEADER_BYTES + len(payload))
        if marker == ERROR:
            text = parse_message(RPCError, payload).message
            if not text:
                return None
            raise RemoteError(self.peer, text)
        return parse_message(message_type, payload)

    def keep(self, at_least: int = 0) -> int:
        """Count the message that was taken last until ``let_go`` or ``close``; how many bytes that is.

        A small message counts nothing unless ``at_least`` is said. Overloaded when others hold too much.
        """
        return self._frames.keep(at_least)

    def keep_more(self, num_bytes: int) -> None:
        """Count what others sent for this stream, until ``let_go`` or ``close``. Overloaded as ``keep``."""
        self._frames.keep_more(num_bytes)

    def let_go(self, num_bytes: int) -> None:
        """So many of the bytes that are kept are dealt with."""
        self._frames.let_go(num_bytes)

    async def finish(self) -> None:
        """Close after everything written has reached the peer, waiting a second at most for its side.

        A socket closed with unread input would drop what we wrote last.
        """
        with contextlib.suppress(OSError, RuntimeError):
            self._frames.transport.write_eof()
        await self.close_after_peer()

    async def close_after_peer(self) -> None:
        """Close when the peer has, as it does when it reads an error, or after a second.

        Not before, not even for writing: when the peer sends something at that moment, libp2p's daemon finds the
        stream closed, resets it, and drops the very error.
        """
        with contextlib.suppress(TimeoutError, OSError, RuntimeError):
            async with asyncio.timeout(_LINGER_S):
                self._frames.discard()
                await self._frames.has_ended.wait()
        self.close()

    def close(self) -> None:
        """Close at once; idempotent. What the peer has not read yet still goes to it."""
        self._patience.close()
        self._frames.release()
        self._frames.transport.close()

    def abort(self) -> None:
        """Close, and forget what the peer has not read."""
        self._frames.transport.abort()
        self.close()

    async def _write(self, marker: int, payload: bytes) -> None:
        try:
            num_bytes = self._frames.write(marker, payload)
            if not self._frames.may_write:
                await self._drain(num_bytes)
        except TimeoutError:
            self._frames.transport.abort()  # what it has not read would wait in memory
            raise DeadlineExceeded(f"the peer did not read for {self._send_timeout_s:g} s") from None
        except (OSError, RuntimeError) as error:
            raise StreamEnded(self.peer, "closed the stream") from error
        self._observer.sent(num_bytes)

    async def _drain(self, num_bytes: int) -> None:
        started = time.monotonic()
        async with asyncio.timeout(self._send_timeout_s):
            await self._frames.drain()
        self._observer.flowed(num_bytes - _ON_THE_WAY_BYTES, time.monotonic() - started, is_upload=True)

    async def _arrival(self, timeout_s: float | None) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        self._frames.on_arrival = self._wake
        if timeout_s is not None:
            self._patience.set(timeout_s)
        try:
            await waiter
        finally:
            self._waiter = self._frames.on_arrival = None
            self._patience.clear()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _lose_patience(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimeoutError())


def parse_message(message_type: type[M], payload: bytes | memoryview) -> M:
    """BadRequest when it is damaged, or would become far more than it is."""
    if len(payload) > _LOOKED_THROUGH_BYTES and has_more_fields(payload, _MAX_FIELDS):
        raise BadRequest("message", f"{len(payload)} bytes", f"at most {_MAX_FIELDS} fields in one")
    try:
        message: M = message_type.FromString(payload)
    except DecodeError:
        raise BadRequest("message", f"{len(payload)} bytes", f"not a {message_type.__name__}") from None
    if (
        len(getattr(message, "tensors", ())) > MAX_TENSORS
    ):  # an empty one takes two bytes, and time in each loop
        raise BadRequest("tensors", len(message.tensors), f"at most {MAX_TENSORS} in a message")
    return message

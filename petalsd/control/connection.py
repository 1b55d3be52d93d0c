"""One connection: bounded in number, size and time, answered with one response, always in the same form."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web

from petalsd.control.access import Peer
from petalsd.errors import PetalsdError
from petalsd.status import Error, ErrorText

log = structlog.get_logger(__name__)

MAX_BODY_BYTES = 64 << 10
_MAX_LINE_BYTES = 8190
_MAX_HEADERS = 64
# From the connection to the last byte of the request's head, and from there to that of its body.
REQUEST_TIMEOUT_S = 10.0
# For the whole of a request that is answered at once; a reader that does not read is cut off.
EXCHANGE_TIMEOUT_S = 120.0
MAX_CONNECTIONS = 64
# So many for any one user who may only read: nobody keeps the administrator out.
MAX_CONNECTIONS_PER_READER = 16

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class ConnectionLimits:
    """Counts connections. ``is_privileged`` says whose may use all there is; the network counts as one user."""

    def __init__(
        self,
        is_privileged: Callable[[Peer], bool],
        max_connections: int = MAX_CONNECTIONS,
        max_per_reader: int = MAX_CONNECTIONS_PER_READER,
    ) -> None:
        self._is_privileged = is_privileged
        self._max_connections = max_connections
        self._max_per_reader = max_per_reader
        self._readers: Counter[int] = Counter()
        self._total = 0

    def enter(self, peer: Peer | None) -> bool:
        """Whether there is room for one more of ``peer`` (None: from the network); if so it is counted."""
        if self._total >= self._max_connections:
            return False
        if self._is_reader(peer):
            if self._readers[_uid(peer)] >= self._max_per_reader:
                return False
            self._readers[_uid(peer)] += 1
        self._total += 1
        return True

    def leave(self, peer: Peer | None) -> None:
        self._total -= 1
        if self._is_reader(peer):
            self._readers[_uid(peer)] -= 1
            self._readers += Counter()  # drops the zeros

    def _is_reader(self, peer: Peer | None) -> bool:
        return peer is None or not self._is_privileged(peer)


class Server(web.Server):
    """Makes a ``Connection`` for each client; ``handler`` answers their requests.

    handler_cancellation  whether it is cancelled when its client goes
    """

    def __init__(
        self, handler: Handler, limits: ConnectionLimits, *, handler_cancellation: bool = False
    ) -> None:
        super().__init__(_closing(handler), handler_cancellation=handler_cancellation)
        self.limits = limits

    def __call__(self) -> web.RequestHandler:
        return Connection(self, self.limits, asyncio.get_running_loop())


class Connection(web.RequestHandler):
    """``peer`` is the process at the other end of a UNIX socket, None on a network socket."""

    def __init__(self, server: Server, limits: ConnectionLimits, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]
            lingering_time=0.0,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
            max_headers=_MAX_HEADERS,
        )
        self._limits = limits
        self._is_counted = False
        self._timer: asyncio.TimerHandle | None = None
        self.peer: Peer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        try:
            self.peer = _peer_of(transport)
        except OSError:  # gone already
            self.force_close()
            return
        self._is_counted = self._limits.enter(self.peer)
        if not self._is_counted:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "too many connections", "retry later")
            return
        self._bound(REQUEST_TIMEOUT_S, self._head_is_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.unbound()
        if self._is_counted:
            self._is_counted = False
            self._limits.leave(self.peer)

    def begin(self) -> None:
        """The head of the request is here: from now on the whole exchange has its time."""
        self._bound(EXCHANGE_TIMEOUT_S, self.force_close)

    def unbound(self) -> None:
        """The answer is a stream that lasts as long as what it tells of."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What the library refuses by itself: bytes that are no HTTP, lines and heads that are too long."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun, its end cannot be an error")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("control_request_failed", exc_info=exc)
            return error_response(status, "internal_error", "see the daemon's log")
        text = " ".join((message or "not HTTP").split())
        response = error_response(status, "bad_request", f"not an HTTP request: {text[:200]}")
        response.force_close()
        return response

    def _bound(self, seconds: float, late: Callable[[], None]) -> None:
        self.unbound()
        self._timer = asyncio.get_running_loop().call_later(seconds, late)

    def _head_is_late(self) -> None:
        text = f"no whole request came within {REQUEST_TIMEOUT_S:g} s"
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, "deadline_exceeded", text)

    def _refuse(self, status: HTTPStatus, code: str, message: str, hint: str = "") -> None:
        """Without a request there is no response object either."""
        body = error_body(code, message, hint)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        if self.transport is not None:
            self.transport.write(head.encode() + body)
        self.force_close()


def error_body(code: str, message: str, hint: str = "", acting_group: str | None = None) -> bytes:
    """The form of every error."""
    text = ErrorText(code=code, message=message, hint=hint, acting_group=acting_group)
    return Error(error=text).model_dump_json().encode()


def error_response(
    status: int, code: str, message: str, hint: str = "", acting_group: str | None = None
) -> web.Response:
    body = error_body(code, message, hint, acting_group)
    return web.Response(status=status, body=body, content_type="application/json")


def refusal(error: PetalsdError, status: int) -> web.Response:
    """The answer for an error that was raised on purpose."""
    return error_response(status, error.code, error.message, error.hint)


async def read_body(request: web.BaseRequest, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """At most ``max_bytes`` within REQUEST_TIMEOUT_S; HTTPRequestEntityTooLarge or HTTPRequestTimeout."""
    length = request.content_length
    if length is not None and length > max_bytes:
        raise web.HTTPRequestEntityTooLarge(max_bytes, length)
    body = bytearray()
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > max_bytes:
                    raise web.HTTPRequestEntityTooLarge(max_bytes, len(body))
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    return bytes(body)


async def write_in_time(response: web.StreamResponse, data: bytes, timeout_s: float) -> None:
    """ConnectionError for a client that has left, or that does not read."""
    try:
        async with asyncio.timeout(timeout_s):
            await response.write(data)
    except TimeoutError:
        raise ConnectionError("the client does not read") from None


def parse_json_object(body: bytes) -> dict[str, Any]:
    """An empty body is an empty object; ValueError says what else is wrong with it."""
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8: {error}") from error
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"the body is {type(value).__name__}, not a JSON object")
    return value


def _closing(handler: Handler) -> Handler:
    """One request per connection, so that limits on connections are limits on requests."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.begin()
        response = await handler(request)
        response.force_close()
        return response

    return handle


def _peer_of(transport: asyncio.BaseTransport) -> Peer | None:
    raw = transport.get_extra_info("socket")
    if raw is None or raw.family != socket.AF_UNIX:
        return None
    with socket.fromfd(raw.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        return Peer.of(connection)


def _uid(peer: Peer | None) -> int:
    """Network clients count as one user."""
    return -1 if peer is None else peer.uid
